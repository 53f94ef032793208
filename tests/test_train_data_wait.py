"""The time that training waits for images: measured, logged, and said once an epoch when it is long."""

import pytest

from spark_me.train.logs import STEPS_OF_WAIT, DataWait


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(wait: DataWait, clock: Clock, steps: int, waited: float, step: float = 1.0) -> list[str]:
    said = []
    for _ in range(steps):
        clock.now += step
        said.append(wait.add(waited))
    return [line for line in said if line is not None]


def test_a_starved_trainer_says_so_once_an_epoch() -> None:
    clock = Clock()
    wait = DataWait(4, clock)
    expected = (
        "the loader is the bottleneck: 63% of the time is spent waiting for images; "
        "raise data.workers (now 4) or shrink the images"
    )
    assert run(wait, clock, STEPS_OF_WAIT, 0.63) == []  # the first step does not count
    assert run(wait, clock, 50, 0.63) == [expected]
    wait.begin_epoch()
    clock.now += 1000  # a long evaluation is no waiting
    assert run(wait, clock, 50, 0.63) == [expected]


@pytest.mark.parametrize("waited", [0.0, 0.19])
def test_a_fed_trainer_says_nothing(waited: float) -> None:
    clock = Clock()
    wait = DataWait(4, clock)
    wait.add(30.0)  # starting the workers
    assert run(wait, clock, 100, waited) == []
