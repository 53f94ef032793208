"""A step has one exchange; a run whose length is given in steps ends there, wherever its epochs end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_runs import SMALL, newest, write_config, write_images
from torch import Tensor, multiprocessing, nn

from spark_me import cli
from spark_me.config.loading import load_config
from spark_me.train.checkpoint import list_checkpoints
from spark_me.train.logs import read_metrics
from spark_me.train.pretrain import Pretraining, pretrain
from spark_me.train.step import Stepper


def test_a_run_of_steps_ends_within_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL)  # 4 steps an epoch
    length = ["train.epochs=null", "train.steps=6", "optim.warmup_epochs=null", "optim.warmup_share=0.5"]
    run = tmp_path / "run"
    pretrain(load_config(path, [f"run.dir={run}", "run.checkpoint_every_steps=null", *length]))
    assert [checkpoint.stem for checkpoint in list_checkpoints(run / "checkpoints")] == [
        "step_00000004",
        "step_00000006",
    ]
    entries = read_metrics(run / "metrics.jsonl")
    rates = [entry["lr"] for entry in entries if "lr" in entry]
    peak = 0.05 * 2 / 256
    assert len(rates) == 6 and rates[3] == max(rates) == pytest.approx(peak)
    assert rates[-1] == pytest.approx(0.001 * peak)
    assert [entry["step"] for entry in entries if "held_out_loss" in entry] == [4, 6]
    assert (run / "reconstruction.png").is_file()
    out = capsys.readouterr().out
    assert "6 steps of 2, adamw with peak lr 0.000391 (base_lr 0.05 · 2 / 256)" in out
    assert "epoch 2/2 · step 6" in out

    pretrain(load_config(path, [f"run.dir={run}", *length]))
    assert "this run is complete" in capsys.readouterr().out


def test_whole_epochs_and_as_many_steps_are_the_same_run(tmp_path: Path) -> None:
    path = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL, epochs=1)
    in_steps = ["train.epochs=null", "train.steps=4", "optim.warmup_epochs=null", "optim.warmup_share=0.25"]
    pretrain(load_config(path, [f"run.dir={tmp_path / 'epochs'}", "optim.warmup_epochs=0.25"]))
    pretrain(load_config(path, [f"run.dir={tmp_path / 'steps'}", *in_steps]))
    one, other = newest(tmp_path / "epochs")["model"], newest(tmp_path / "steps")["model"]
    assert all(torch.equal(one[key], other[key]) for key in one)


def exchanges(rank: int, folder: Path) -> None:
    """Write down what processes tell each other, and which steps they take between."""
    torch.set_num_threads(1)
    said: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # Norms exchange their sums in float32.
            if not (isinstance(arguments[0], Tensor) and arguments[0].dtype == torch.float32):
                said.append(name)
            return function(*arguments, **options)

        return call

    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "barrier", "all_gather", "broadcast"):
        setattr(dist, name, noted(name, getattr(dist, name)))
    Stepper.take = noted("step", Stepper.take)  # type: ignore[method-assign]
    pretrain(load_config(folder / "tiny.yaml", [f"run.dir={folder / 'run'}"]))
    (folder / f"said_{rank}").write_text(" ".join(said))
    dist.destroy_process_group()


def test_a_step_has_one_exchange(tmp_path: Path) -> None:
    path = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL, epochs=1)  # 4 steps
    path.write_text(path.read_text().replace("checkpoint_every_steps: 2", "checkpoint_every_steps: null"))
    multiprocessing.start_processes(exchanges, (tmp_path,), nprocs=2, start_method="fork")
    for rank in (0, 1):
        _, *between, _ = (tmp_path / f"said_{rank}").read_text().split("step")
        assert [words.split() for words in between] == [["all_reduce"]] * 3


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL)
    loss, taken = Pretraining.loss, []

    def nan_in_the_third(self: Pretraining, model: nn.Module, *tensors: Tensor) -> Tensor:
        taken.append(loss(self, model, *tensors))
        return taken[-1] * (torch.nan if len(taken) == 3 else 1)

    monkeypatch.setattr(Pretraining, "loss", nan_in_the_third)
    assert cli.main(["pretrain", str(path), f"run.dir={tmp_path / 'run'}"]) == 2  # a checkpoint every other step
    assert "the loss is nan at step 3 (images: " in capsys.readouterr().err
    assert [each.name for each in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002.pt"]
