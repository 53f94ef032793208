"""Checkpoints: everything a run needs to go on as if it had never stopped."""

import pickle
import zipfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import spark_me
from spark_me.config import Config, parse_config, to_yaml
from spark_me.errors import UserError
from spark_me.files import atomic_write
from spark_me.spark import SparK

FORMAT = "spark_me.pretrain"
FORMAT_VERSION = 1


@dataclass
class TrainState:
    """What training changes."""

    model: SparK
    optimizer: Optimizer
    step: int = 0
    """Steps done; decides the schedule, the epoch and the batch that comes next."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Reasons by path of the files that were skipped."""


def save_checkpoint(
    folder: Path, state: TrainState, config: Config, *, steps_per_epoch: int, data_fingerprint: str, keep_last: int
) -> Path:
    """Write `step_N.pt` atomically, then delete all but the newest `keep_last`.

    Raises:
        UserError: if it cannot be written; earlier checkpoints are untouched.
    """
    epoch, step_in_epoch = divmod(state.step, steps_per_epoch)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": to_yaml(config),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "samples_seen": state.step * config.train.batch_size,
        "data": data_fingerprint,
        "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        "unreadable": state.unreadable,
        "versions": {
            "spark_me": spark_me.__version__,
            "torch": str(torch.__version__),
            "MinkowskiEngine": version("MinkowskiEngine"),
        },
    }
    path = folder / f"step_{state.step:08d}.pt"
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except UserError as error:
        kept = list_checkpoints(folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise UserError(f"{error}; {last}: the same command goes on from it") from None
    for old in list_checkpoints(folder)[:-keep_last]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU, without running any code that it may hold.

    Raises:
        UserError: if it is missing, truncated, or not written by this program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint: check the path") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
        # torch says the same in many ways and many lines.
        raise UserError(f"{path}: is truncated or no checkpoint: use an earlier checkpoint") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is no pretraining checkpoint of spark_me: give one from a run's checkpoints/ folder")
    if content["format_version"] != FORMAT_VERSION:
        found = content["format_version"]
        raise UserError(f"{path}: has format {found}, this version reads {FORMAT_VERSION}: use the spark_me it is from")
    return content


def config_of(content: dict[str, Any], path: Path) -> Config:
    """The configuration that a checkpoint was written under."""
    return parse_config(content["config"], str(path))


def load_model(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a model of the same architecture.

    Raises:
        UserError: if the model is another one.
    """
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: is of another model: {detail}: use the configuration that it was made with") from None


def restore(state: TrainState, content: dict[str, Any], path: Path) -> None:
    """Bring model, optimizer, position and random state back to where the checkpoint was written."""
    load_model(state.model, content, path)
    state.optimizer.load_state_dict(content["optimizer"])
    state.step = content["step"]
    state.unreadable.update(content["unreadable"])
    torch.set_rng_state(content["rng"]["cpu"])
    if torch.cuda.is_available() and len(content["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(content["rng"]["cuda"])
