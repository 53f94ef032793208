"""Memory stays flat over the steps of a whole run."""

import gc
from pathlib import Path

import pytest
import torch
from tiny_runs import SMALL, write_config, write_images

from spark_me import cli
from spark_me.train.checkpoint import CheckpointWriter
from spark_me.train.logs import RunLog

EPOCHS, STEPS = 5, 48
"""And the steps of an epoch."""
PAGE = 4096


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_steps_evaluations_and_checkpoints_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL, epochs=EPOCHS)
    report, seen = RunLog.step, []

    def count(self: RunLog, step: int, values: dict[str, float], images: int) -> None:
        report(self, step, values, images)
        if step % STEPS == 2:  # at the same place of an epoch
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
            seen.append((live_tensors(), resident))

    monkeypatch.setattr(RunLog, "step", count)
    # The copy of a checkpoint that is still being written counts, and how long that takes is the disk's affair.
    save = CheckpointWriter.save
    monkeypatch.setattr(
        CheckpointWriter, "save", lambda self, *content, **how: (save(self, *content, **how), self.wait())
    )
    overrides = [f"run.dir={tmp_path / 'run'}", "data.repeats=12", "run.checkpoint_every_steps=25"]
    assert cli.main(["pretrain", str(config), *overrides]) == 0
    tensors, resident = zip(*seen)
    assert len(tensors) == EPOCHS
    # After the first epoch every cache is warm.
    assert max(tensors[1:]) - tensors[1] <= 10, tensors
    assert resident[-1] - resident[1] < 15 * 2**20, resident
