"""A run that is killed with SIGKILL, twice, ends with bitwise the weights of one that was not."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from child import Child
from tiny_runs import assert_same_end, write_images

from spark_me.cli import main
from spark_me.train.checkpoint import list_checkpoints
from spark_me.train.logs import RunLog

# 6 steps an epoch, a checkpoint after every third: step 5 lies within an epoch, and so does its last checkpoint.
CONFIG = """
model: {{encoder: small, backend: native, image_size: [64, 64], decoder_width: 32, drop_path: 0.3}}
data: {{root: {images}, held_out: 2, workers: 1}}
optim: {{name: lamb, base_lr: 0.5, warmup_epochs: 1}}
train: {{epochs: 2, batch_size: 2}}
run: {{checkpoint_every_steps: 3, log_every_steps: 1, device: cpu}}
"""


def run(config: Path, directory: Path, prepare: Callable[[], object] = int) -> tuple[int, str]:
    """Code and output of a training in a process of its own, which `prepare` may change before it begins."""

    def command() -> int:
        prepare()
        return main(["pretrain", str(config), f"run.dir={directory}"])

    child = Child(command)
    return child.wait(), child.output


# The process kills itself, so that it dies at the same place every time: nothing of it runs after the signal.


def die_after(step: int, checkpoint: Path) -> None:
    report = RunLog.step

    def report_then_die(self: RunLog, number: int, values: dict[str, float], images: int) -> None:
        report(self, number, values, images)
        if number == step:
            while not checkpoint.exists():  # written beside the training
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.step = report_then_die  # type: ignore[method-assign]


def die_while_writing(step: int) -> None:
    sync = os.fsync

    def die_at_checkpoint(descriptor: int) -> None:
        if f"step_{step:08d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = die_at_checkpoint


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(images=write_images(tmp_path / "images", 14)))
    return path


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the file being written through /proc")
@pytest.mark.usefixtures("undrawn")
def test_killed_and_resumed_equals_undisturbed(config: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    code, output = run(config, calm)
    assert code == 0, output

    code, output = run(config, killed, lambda: die_after(5, killed / "checkpoints/step_00000003.pt"))
    assert code == -signal.SIGKILL, output
    assert list_checkpoints(killed / "checkpoints")[-1].name == "step_00000003.pt"

    code, output = run(config, killed, lambda: die_while_writing(9))
    assert code == -signal.SIGKILL, output
    assert "step_00000003.pt, 3 steps done" in output
    assert list_checkpoints(killed / "checkpoints")[-1].name == "step_00000006.pt"

    code, output = run(config, killed)
    assert code == 0, output
    assert "step_00000006.pt, 6 steps done" in output

    assert_same_end(killed, calm)
    assert not list(killed.rglob("*.tmp.*"))
