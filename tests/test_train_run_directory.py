"""The directory of a run: one run at a time, finite numbers, and runs that go on from the last step of another."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from child import Child

from spark_me import cli
from spark_me.spark import SparK
from spark_me.train import pretrain as pretraining
from spark_me.train.checkpoint import list_checkpoints, read_checkpoint
from spark_me.train.pretrain import Pretraining
from spark_me.train.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny_runs.write_config(
        tmp_path / "tiny.yaml", tiny_runs.write_images(tmp_path / "images"), encoder=tiny_runs.SMALL
    )


def pretrain(config: Path, *overrides: str) -> int:
    return cli.main(["pretrain", str(config), f"run.dir={config.parent / 'run'}", *overrides])


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_second_run_in_a_directory_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    run = tmp_path / "run"

    def hold() -> None:
        with RunDirectory(run).owned():
            print("held")
            while not (tmp_path / "enough").exists():
                time.sleep(0.01)

    other = Child(hold)
    while not other.output:
        assert other.poll() is None
    assert pretrain(config) == 2
    assert f"{run}: another run is writing there now" in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == ["lock"], "nothing was written"
    if end == "killed":
        other.kill()
    else:
        (tmp_path / "enough").touch()
    assert other.wait() == (-signal.SIGKILL if end == "killed" else 0)
    assert run.exists() == (end == "killed")
    with RunDirectory(run).owned():
        assert (run / "lock").exists()
    assert not (run / "lock").exists()


def test_children_of_a_run_do_not_keep_its_lock(tmp_path: Path) -> None:
    """As data workers, which outlive a killed run for some seconds."""
    with RunDirectory(tmp_path / "run").owned():
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with RunDirectory(tmp_path / "run").owned():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_checkpoint_says_which_configuration_a_run_has(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the directory's own record of it is gone."""
    assert pretrain(config) == 0
    (tmp_path / "run" / "config.yaml").unlink()
    capsys.readouterr()
    assert pretrain(config, "run.seed=7", "optim.base_lr=0.01", "train.epochs=3") == 2
    error = capsys.readouterr().err
    assert "checkpoints: is of another configuration" in error
    assert "run.seed: 0 → 7" in error and "optim.base_lr: 0.05 → 0.01" in error
    assert pretrain(config) == 0
    assert "this run is complete" in capsys.readouterr().out


def test_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(config) == 0
    expected = tiny_runs.newest(tmp_path / "run")["model"]
    folder = tmp_path / "run" / "checkpoints"
    *_, third, second, newest = list_checkpoints(folder)
    for path, change in ((newest, flip), (second, drop_an_entry)):
        change(path)
    assert pretrain(config) == 0
    out = capsys.readouterr().out
    assert out.count("skipped a damaged checkpoint") == 2 and f"going on from {third}, 4 steps done" in out
    tiny_runs.assert_equal(tiny_runs.newest(tmp_path / "run")["model"], expected)
    for path in list_checkpoints(folder):
        path.unlink()
    assert pretrain(config) == 0
    best = torch.load(folder / "best.pt", weights_only=True)["step"]
    assert f"{best} steps done" in (out := capsys.readouterr().out) or (best == 8 and "this run is complete" in out)


def flip(path: Path) -> None:
    """A bit of its tensors."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def drop_an_entry(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    del content["optimizer"]
    torch.save(content, path)


def test_what_kills_left_is_cleared_when_a_run_starts(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for place in (folder.parent / f".{'0' * 16}.tmp.metrics.jsonl", folder / f".{'1' * 16}.tmp.step_00000002.pt"):
        place.write_text("half")
    assert pretrain(config) == 0
    assert not [path for path in folder.parent.rglob("*") if ".tmp" in path.name]


def test_numbers_that_are_not_finite_are_never_saved(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Overflowing(SparK):
        """The statistics of a norm overflow at the sixth step; loss and gradients stay finite."""

        steps = 0

        def forward(self, *inputs: Any) -> torch.Tensor:
            loss = super().forward(*inputs)
            self.steps += self.training
            if self.steps == 6:
                self.encoder.bn1.running_var.data.fill_(torch.inf)
            return loss

    build = pretraining.model_of

    def build_overflowing(config: Any) -> SparK:
        model = build(config)
        model.__class__ = Overflowing
        return model

    monkeypatch.setattr(pretraining, "model_of", build_overflowing)
    assert pretrain(config) == 2
    assert "encoder.bn1.running_var is not finite at step 6; this checkpoint was not written" in capsys.readouterr().err
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step_00000002.pt", "step_00000004.pt"]


def test_held_out_loss_that_is_no_number_is_never_the_best(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([float("nan"), float("nan")])
    monkeypatch.setattr(Pretraining, "evaluate", lambda *args: {"held_out_loss": next(losses)})
    assert pretrain(config) == 0
    assert "held-out loss 0" not in capsys.readouterr().out
    folder = tmp_path / "run" / "checkpoints"
    assert not (folder / "best.pt").exists() and read_checkpoint(list_checkpoints(folder)[-1])["best"] is None


def test_going_on_from_the_last_step_of_a_finished_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(config) == 0
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert cli.main(["pretrain", str(config), f"run.dir={tmp_path / 'other'}", f"run.resume={last}"]) == 0
    out = capsys.readouterr().out
    assert "this run is complete" in out and f"reconstruct {last} YOUR_PHOTO.jpg" in out


def test_batch_of_one_visible_patch_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(config, "train.batch_size=1", "model.encoder=resnet18") == 2
    assert "a batch has one visible patch" in capsys.readouterr().err
