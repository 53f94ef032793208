"""A run that is killed with SIGKILL, twice, ends with bitwise the weights of one that was not."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark_me.train.checkpoint import list_checkpoints, read_checkpoint
from spark_me.train.metrics import read_metrics

# 6 steps an epoch, a checkpoint after every third: step 5 lies within an epoch, and so does its last checkpoint.
CONFIG = """
model: {{encoder: resnet18, backend: fused, image_size: [64, 64], decoder_width: 32, drop_path: 0.3}}
data: {{root: {images}, held_out: 2, workers: 1}}
optim: {{name: lamb, base_lr: 0.5, warmup_epochs: 1}}
train: {{epochs: 2, batch_size: 2}}
run: {{checkpoint_every_steps: 3, log_every_steps: 1, device: cpu}}
"""

# The process kills itself, so that it dies at the same place every time: nothing of it runs after the signal.
DIE_AFTER_STEP = """
from spark_me.train.logging import RunLog
report = RunLog.step

def report_then_die(self, step, values, images):
    report(self, step, values, images)
    if step == {step}:
        while not os.path.exists("{checkpoint}"):  # written beside the training
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

RunLog.step = report_then_die
"""
DIE_WHILE_WRITING = """
sync = os.fsync

def die_at_checkpoint(descriptor):
    if "step_{step:08d}" in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)

os.fsync = die_at_checkpoint
"""
MAIN = "import os, signal, sys, time\n{death}\nfrom spark_me.cli import main\nsys.exit(main(sys.argv[1:]))"


def run(config: Path, directory: Path, death: str = "") -> tuple[int, str]:
    command = [sys.executable, "-c", MAIN.format(death=death), "pretrain", str(config), f"run.dir={directory}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def config(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for number in range(14):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(images / f"{number:02}.png")
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(images=images))
    return path


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the file being written through /proc")
def test_killed_and_resumed_equals_undisturbed(config: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    code, output = run(config, calm)
    assert code == 0, output

    code, output = run(
        config, killed, DIE_AFTER_STEP.format(step=5, checkpoint=killed / "checkpoints/step_00000003.pt")
    )
    assert code == -signal.SIGKILL, output
    assert list_checkpoints(killed / "checkpoints")[-1].name == "step_00000003.pt"

    code, output = run(config, killed, DIE_WHILE_WRITING.format(step=9))
    assert code == -signal.SIGKILL, output
    assert "step_00000003.pt, 3 steps done" in output
    assert list_checkpoints(killed / "checkpoints")[-1].name == "step_00000006.pt"

    code, output = run(config, killed)
    assert code == 0, output
    assert "step_00000006.pt, 6 steps done" in output

    last = "checkpoints/step_00000012.pt"
    expected, actual = read_checkpoint(calm / last), read_checkpoint(killed / last)
    assert_equal(actual["model"], expected["model"])
    assert_equal(actual["optimizer"], expected["optimizer"])
    assert values(killed) == values(calm)
    assert not list(killed.rglob("*.tmp"))


def values(directory: Path) -> list[dict]:
    """The metrics of every step, without those of the machine."""
    entries = read_metrics(directory / "metrics.jsonl")
    machine = {"images_per_second", "data_wait", "memory_gib"}
    return [{key: value for key, value in entry.items() if key not in machine} for entry in entries]


def assert_equal(actual: object, expected: object, place: str = "") -> None:
    """Bitwise equality of nested containers of tensors."""
    assert type(actual) is type(expected), place
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), place  # type: ignore[arg-type]
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), place  # type: ignore[call-overload]
        for key in expected:
            assert_equal(actual[key], expected[key], f"{place}.{key}")  # type: ignore[index]
    elif isinstance(expected, list):
        assert len(actual) == len(expected), place  # type: ignore[arg-type]
        for number, (one, other) in enumerate(zip(actual, expected)):  # type: ignore[call-overload]
            assert_equal(one, other, f"{place}[{number}]")
    else:
        assert actual == expected, place
