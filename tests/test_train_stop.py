"""Being asked to stop: the first signal is answered at once, a second Ctrl-C stops and says what is lost."""

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from child import Child

from spark_me import cli
from spark_me.train.checkpoint import list_checkpoints
from spark_me.train.step import Stepper
from spark_me.train.trainer import StopRequest


def compute() -> None:
    with StopRequest() as stop:
        print("computing")
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)  # one instruction of Python's, of about a second
        assert stop.signal is not None
        print("computed", stop.signal.name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_answer_does_not_wait_for_what_is_computed(number: signal.Signals) -> None:
    child = Child(compute)
    while not child.output:
        time.sleep(0.01)
    os.kill(child.pid, number)
    assert child.wait() == 0, child.output
    computing, answer, computed = child.output.splitlines()
    assert computing == "computing" and "finishing this step, then saving" in answer
    assert computed == f"computed {number.name}"


def test_handlers_are_put_back_and_silence_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    for _ in range(3):
        with StopRequest(answer=False) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):  # a Ctrl-C after it is in a hurry
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (1, "nothing is lost since the beginning; the same command goes on from there"),
        (2, "1 step since the beginning lost; the same command goes on from there"),
        (3, "nothing is lost since {folder}/step_00000002.pt; the same command goes on from there"),
        (4, "1 step since {folder}/step_00000002.pt lost; the same command goes on from there"),
    ],
)
def test_second_interruption_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int, said: str
) -> None:
    config = tiny_runs.write_config(
        tmp_path / "tiny.yaml", tiny_runs.write_images(tmp_path / "images"), encoder=tiny_runs.SMALL
    )
    take = Stepper.take

    def interrupted(self: Stepper, *arguments: Any) -> Any:
        if self.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, *arguments)

    monkeypatch.setattr(Stepper, "take", interrupted)
    assert cli.main(["pretrain", str(config), f"run.dir={tmp_path / 'run'}"]) == 130
    folder = tmp_path / "run" / "checkpoints"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"spark-me: interrupted: {said.format(folder=folder)}"
    assert len(list_checkpoints(folder)) == (step > 2)
