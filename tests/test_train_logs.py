"""What a run tells on the screen where that is no terminal, and how long it expects to take."""

from pathlib import Path

import pytest
import tiny_runs

from spark_me.train import logs
from spark_me.train.logs import RunLog, duration_text


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs.time, "perf_counter", clock.perf_counter)
    return clock


def run(folder: Path, clock: Clock, *, seconds: float, steps: int, first_step: int = 0, print_every: int = 10) -> None:
    folder.mkdir(exist_ok=True)
    log = RunLog(
        tiny_runs.run_directory(folder),
        steps=steps,
        steps_per_epoch=40,
        first_step=first_step,
        log_every=5,
        print_every=print_every,
        workers=0,
    )
    for step in range(first_step + 1, steps + 1):
        # The first step takes long: it starts the workers.
        clock.now += seconds if step > first_step + 1 else 60 + seconds
        log.step(step, {"loss": 0.5, "data_wait": 0.0}, images=8)
    log.close()


def test_lines_come_every_so_many_steps_with_the_time_left(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, clock, seconds=6, steps=100)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if " · step " in line]
    # Not at 40 and 80, whose epochs end with a line of their own, nor at the end.
    numbers = [line.split(" · ")[1] for line in steps]
    assert numbers == [f"step {number}/100" for number in (10, 20, 30, 50, 60, 70, 90)]
    assert steps[0].startswith("epoch 1/3 · step 10/100 · loss 0.5000 · ") and steps[0].endswith(" · 09:00 left")
    assert steps[-1].startswith("epoch 3/3") and steps[-1].endswith(" · 01:00 left")


@pytest.mark.parametrize(
    ("seconds", "steps", "first_step", "expected"),
    [
        (6.0, 100, 0, "expect 10 min: 96 more steps of 6 s, and measuring between"),  # after 10 seconds and three steps
        (0.5, 1000, 0, "expect 8 min: 994 more steps of 0.5 s, and measuring between"),  # after five steps
        (6.0, 100, 50, "expect 5 min: 46 more steps of 6 s, and measuring between"),  # a run that goes on
        (0.5, 50, 0, None),  # so short that it is over before it is read
    ],
)
def test_expected_time_is_said_once_at_the_start(
    tmp_path: Path,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    steps: int,
    first_step: int,
    expected: str | None,
) -> None:
    run(tmp_path, clock, seconds=seconds, steps=steps, first_step=first_step, print_every=10_000)
    assert capsys.readouterr().out.splitlines() == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45, "45 s"), (600, "10 min"), (12_000, "3 h 20 min"), (3 * 86400 + 7200, "3 days 2 h")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
