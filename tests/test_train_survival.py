"""What stops a run from outside: signals, kills at any moment, dead workers, full disks, vanished files."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from child import Child
from tiny_runs import SMALL, assert_same_end, content_of, newest, write_config, write_images

from spark_me import cli
from spark_me.errors import UserError
from spark_me.train import checkpoint
from spark_me.train.checkpoint import list_checkpoints, read_checkpoint
from spark_me.train.step import Stepper, Taken


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def pretrain(config: Path, run: Path, *overrides: str) -> int:
    return cli.main(["pretrain", str(config), f"run.dir={run}", *overrides])


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Have something happen once, after a step was taken."""

    def install(at: int, act: Callable[[], object]) -> None:
        take, done = Stepper.take, []

        def take_then_act(self: Stepper, *arguments: Any) -> Taken:
            taken = take(self, *arguments)
            if taken.step == at and not done:
                done.append(act())
            return taken

        monkeypatch.setattr(Stepper, "take", take_then_act)

    return install


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spark-me:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(
    tmp_path: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    after_step: Callable,
    number: signal.Signals,
) -> None:
    config = write_config(tmp_path / "tiny.yaml", images, encoder=SMALL)
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    after_step(5, lambda: os.kill(os.getpid(), number))
    assert pretrain(config, tmp_path / "stopped") == 0
    saved = tmp_path / "stopped/checkpoints/step_00000005.pt"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"stopped as asked, 5 steps done and saved in {saved}: repeat the command to go on"
    assert read_checkpoint(saved)["step"] == 5
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert pretrain(config, tmp_path / "stopped") == 0
    assert pretrain(config, tmp_path / "calm") == 0
    assert_same_end(tmp_path / "stopped", tmp_path / "calm")


@pytest.mark.usefixtures("undrawn")
def test_second_interrupt_stops_at_once(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], after_step: Callable
) -> None:
    after_step(3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert pretrain(write_config(tmp_path / "tiny.yaml", images, encoder=SMALL), tmp_path / "run") == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("spark-me: interrupted: ")
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000002.pt"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, images: Path, one_thread: None, kills: int) -> None:
    # A kill is sent at a random moment of a run's progress, which may be within a step, a checkpoint or a picture.
    config = write_config(tmp_path / "tiny.yaml", images, encoder=SMALL, epochs=3 * kills)
    run, progress = tmp_path / "killed", tmp_path / "killed/metrics.jsonl"
    moments = random.Random(0)
    for _ in range(kills):
        before = progress.stat().st_size if progress.exists() else 0
        child = Child(lambda: pretrain(config, run))
        while child.poll() is None and (not progress.exists() or progress.stat().st_size == before):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 2))
        child.kill()
        child.wait()
        assert "Traceback" not in child.output
        for path in (run / "checkpoints").glob("[!.]*.pt"):  # without what it was writing
            read_checkpoint(path)
    for directory in (run, tmp_path / "calm"):
        assert pretrain(config, directory) == 0
    assert_same_end(run, tmp_path / "calm")
    assert not list(run.rglob("*.tmp.*"))


@pytest.mark.usefixtures("undrawn")
def test_killed_worker_is_one_line(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], after_step: Callable
) -> None:
    def kill_worker() -> None:
        (worker,) = multiprocessing.active_children()
        worker.kill()
        worker.join()

    after_step(3, kill_worker)
    config = write_config(tmp_path / "tiny.yaml", images, encoder=SMALL, workers=1, epochs=20)
    assert pretrain(config, tmp_path / "run") == 2
    line = error_line(capsys)
    assert "a process that loads images died (DataLoader worker" in line
    assert "repeat the command to go on" in line
    assert newest(tmp_path / "run")["step"] == 2


@pytest.mark.usefixtures("undrawn")
def test_vanished_images_are_one_line(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], after_step: Callable
) -> None:
    after_step(3, lambda: shutil.rmtree(images))
    assert pretrain(write_config(tmp_path / "tiny.yaml", images, encoder=SMALL), tmp_path / "run") == 2
    line = error_line(capsys)
    assert "images are unreadable" in line and "FileNotFoundError" in line
    assert newest(tmp_path / "run")["step"] == 2


@pytest.mark.usefixtures("undrawn")
def test_checkpoint_that_cannot_be_written_stops_the_next_step(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = checkpoint.write_checkpoint, []

    def fill_up(folder: Path, content: dict, **options: object) -> Path:
        if written:
            raise UserError("disk full")
        written.append(write(folder, content, keep_last=3))
        return written[0]

    monkeypatch.setattr(checkpoint, "write_checkpoint", fill_up)
    assert pretrain(write_config(tmp_path / "tiny.yaml", images, encoder=SMALL), tmp_path / "run") == 2
    assert error_line(capsys) == "spark-me: error: disk full"
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000002.pt"]


def test_error_of_the_last_write_surfaces(tmp_path: Path) -> None:
    with checkpoint.CheckpointWriter(tmp_path / "missing", keep_last=1) as one:
        one.save({"step": 1})
        with pytest.raises(UserError, match="cannot be written"):
            one.wait()
        one.wait()  # told once
        one.save({"step": 2})
        with pytest.raises(UserError, match="step_00000002.pt: cannot be written"):
            one.save({"step": 3})


def test_writer_keeps_what_it_was_given(tmp_path: Path) -> None:
    from spark_me.config.tasks import PretrainConfig
    from spark_me.train.checkpoint import TrainState

    layer = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    state = TrainState(layer, optimizer, torch.amp.GradScaler("cpu", enabled=False), step=1)
    expected = layer.weight.detach().clone()
    content = content_of(state, PretrainConfig(), task="pretrain", steps_per_epoch=1, data_fingerprint="")
    optimizer.step()
    with checkpoint.CheckpointWriter(tmp_path, keep_last=1) as one:
        one.save(content, best=True)
    for name in ("step_00000001.pt", "best.pt"):
        saved = read_checkpoint(tmp_path / name)
        assert torch.equal(saved["model"]["weight"], expected)
        assert saved["optimizer"]["state"][0]["step"] == 1
