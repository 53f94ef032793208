"""Checkpoints: everything a run needs to go on as if it had never stopped; written beside the training."""

import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

import spark_me
from spark_me.config.loading import parse_config
from spark_me.config.tasks import PretrainConfig
from spark_me.engine import ENGINE_NAME, installed_version
from spark_me.errors import UserError
from spark_me.files import atomic_write
from spark_me.weights.files import require_sound, require_weights

PRETRAIN = "pretrain"
FINETUNE = "finetune"
FORMAT_VERSION = 3
BEST = "best.pt"
NAME = re.compile(r"step_(\d{8}|[1-9]\d{8,})\.pt")
ENTRIES: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    PRETRAIN: {
        "config": str,
        "model": dict,
        "optimizer": dict,
        "scaler": dict,
        "step": int,
        "best": (float, int, type(None)),
        "data": str,
        "unreadable": dict,
    },
    FINETUNE: {"classes": list, "ema": (dict, type(None))},
}
"""Types of the entries that are read again: of all tasks, and those that fine-tuning adds."""


@dataclass
class TrainState:
    """What training changes."""

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    """Of fp16's loss; without effect in other precisions."""
    step: int = 0
    """Steps done; decides the schedule, the epoch, the batch that comes next and what is drawn in it."""
    best: float | None = None
    """Best held-out value so far."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Reasons by path of the files that were skipped."""


def checkpoint_of(
    state: TrainState,
    *,
    task: str,
    config: str,
    batch_size: int,
    steps_per_epoch: int,
    data_fingerprint: str,
    entries: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """What a checkpoint holds; its tensors are copies on the CPU, so that training may go on while it is written.

    Args:
        state: what training changes.
        task: its name.
        config: the run's configuration, as YAML.
        batch_size: images in a step.
        steps_per_epoch: batches in an epoch.
        data_fingerprint: of the training images.
        entries: the task's own.
    """
    epoch, step_in_epoch = divmod(state.step, steps_per_epoch)
    return {
        "format": f"spark_me.{task}",
        "format_version": FORMAT_VERSION,
        "config": config,
        "model": _copied(state.model.state_dict()),
        "optimizer": _copied(state.optimizer.state_dict()),
        "scaler": state.scaler.state_dict(),
        "step": state.step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "samples_seen": state.step * batch_size,
        "best": state.best,
        "data": data_fingerprint,
        "unreadable": dict(state.unreadable),
        "versions": {
            "spark_me": spark_me.__version__,
            "torch": str(torch.__version__),
            "MinkowskiEngine": installed_version(ENGINE_NAME),  # fine-tuning does without it
        },
        **_copied(dict(entries)),
    }


def require_finite(state: TrainState) -> None:
    """Refuse to save a model with numbers that are none: it would take the place of a good checkpoint.

    Raises:
        UserError: naming the first such tensor.
    """
    for name, tensor in state.model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{name} is not finite at step {state.step}; this checkpoint was not written: go on from the last one "
                "by run.resume=ITS_PATH in another run.dir, with a lower learning rate or train.precision=fp32"
            )


def checkpoint_size(state: TrainState, entries: Mapping[str, Any]) -> int:
    """Bytes of a checkpoint, within a few percent, also before the optimizer has taken its first step."""
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    # LAMB and AdamW keep two averages of each.
    return _bytes_of(state.model.state_dict()) + 2 * _bytes_of(parameters) + _bytes_of(entries)


def _bytes_of(value: Any) -> int:
    """Of all tensors in a nested container."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, list | tuple) else 0


def require_space(folder: Path, size: int, *, keep_last: int, writes: int) -> str:
    """Refuse a disk on which a run's checkpoints do not fit, before it begins.

    Args:
        folder: of the checkpoints; need not be there yet. What it holds of them is counted as theirs already.
        size: bytes of one.
        keep_last: how many are kept, besides the best one.
        writes: how many the run will write.

    Returns:
        What they take, for people.

    Raises:
        UserError: if less is free than they take.
    """
    # While the newest is written, those before it and the best one are still there.
    most = min(keep_last, max(writes, 1) - 1) + 2
    there = sum(path.stat().st_size for path in [*list_checkpoints(folder), folder / BEST] if path.is_file())
    needed = max(0, most * size - there) if writes else 0
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if needed > free:
        raise UserError(
            f"{folder}: {bytes_text(free)} are free, and the checkpoints of this run take {bytes_text(needed)} "
            f"({most} of {bytes_text(size)}): free space, choose another run.dir, or lower run.keep_last={keep_last}"
        )
    return f"checkpoints of {bytes_text(size)} in {folder}, {bytes_text(most * size)} at most ({bytes_text(free)} free)"


def bytes_text(number: float) -> str:
    """A number of bytes for people: 455 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def write_checkpoint(folder: Path, content: dict[str, Any], *, keep_last: int, best: bool = False) -> Path:
    """Write `step_N.pt` atomically, then delete older ones; with `best`, write best.pt before.

    Kept are the newest `keep_last` that are whole. What has more steps is damaged, or this run would have gone on from
    it: it counts for nothing, and is overwritten or deleted once the run has come that far.

    Raises:
        UserError: if it cannot be written; earlier checkpoints are untouched.
    """
    path = checkpoint_path(folder, content["step"])
    try:
        # A run killed between the two goes on from before, measures the same and writes best.pt again.
        for place in [folder / BEST, path] if best else [path]:
            with atomic_write(place) as file:
                torch.save(content, file)
    except UserError as error:
        kept = list_checkpoints(folder, up_to=content["step"] - 1)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise UserError(f"{error}; {last}: the same command goes on from it") from None
    whole = 1
    for older in reversed(list_checkpoints(folder, up_to=content["step"] - 1)):
        if whole == keep_last:
            older.unlink(missing_ok=True)
        elif _is_whole(older):
            whole += 1
    return path


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after a number of steps lies."""
    return folder / f"step_{step:08d}.pt"


def step_of(path: Path) -> int:
    """The number of steps in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def list_checkpoints(folder: Path, *, up_to: int | None = None) -> list[Path]:
    """Checkpoints in a folder, oldest first; without the best, and without whatever has another name.

    Args:
        folder: need not be there.
        up_to: the most steps that they have.
    """
    found = [path for path in folder.glob("step_*.pt") if NAME.fullmatch(path.name) and path.is_file()]
    return sorted((path for path in found if up_to is None or step_of(path) <= up_to), key=step_of)


def _is_whole(path: Path) -> bool:
    file = path.stat()
    return _is_sound(path, (file.st_ino, file.st_size, file.st_mtime_ns))


@lru_cache(maxsize=64)
def _is_sound(path: Path, version: tuple[int, ...]) -> bool:
    """Asked once of each file, whose checksums take as long as reading it."""
    try:
        require_sound(path)
    except UserError:
        return False
    return True


def read_checkpoint(path: Path, task: str = PRETRAIN) -> dict[str, Any]:
    """Load a task's checkpoint on the CPU, without running any code that it may hold.

    Raises:
        UserError: if it is missing, damaged anywhere, or not written by this program.
    """
    try:
        require_weights(path)
        require_sound(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint: check the path") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
        # torch says the same in many ways and many lines.
        raise UserError(f"{path}: is truncated or no checkpoint: use an earlier checkpoint") from None
    found = str(content.get("format", "")).removeprefix("spark_me.") if isinstance(content, dict) else ""
    if found in (PRETRAIN, FINETUNE) and found != task:
        raise UserError(f"{path}: is a checkpoint of `spark-me {found}`, where one of `spark-me {task}` is needed")
    if found != task:
        raise UserError(f"{path}: is no checkpoint of spark-me {task}: give one from a run's checkpoints/ folder")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: has format {version}, this version reads {FORMAT_VERSION}: use the spark_me it is from"
        )
    for name, types in {**ENTRIES[PRETRAIN], **ENTRIES[task]}.items():
        if not isinstance(content.get(name, NotImplemented), types):
            raise UserError(f"{path}: its entry {name} is missing or of another type: use an earlier checkpoint")
    if content["step"] < 0 or not all(isinstance(tensor, Tensor) for tensor in content["model"].values()):
        raise UserError(f"{path}: its step is negative or its model holds more than tensors: use an earlier checkpoint")
    return content


def config_of(content: dict[str, Any], path: Path) -> PretrainConfig:
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
    """Bring everything that training changes back to where the checkpoint was written."""
    load_model(state.model, content, path)
    state.optimizer.load_state_dict(content["optimizer"])  # made by `build_optimizer`, it keeps its own options
    if content["scaler"]:  # empty in precisions without one
        state.scaler.load_state_dict(content["scaler"])
    state.step = content["step"]
    state.best = content["best"]
    state.unreadable.update(content["unreadable"])


def _copied(value: Any) -> Any:
    """A nested container with copies of its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


class CheckpointWriter:
    """Writes in one thread, one checkpoint at a time. Leaving its block waits for the last one."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[Path] | None = None

    def save(self, content: dict[str, Any], *, best: bool = False) -> None:
        """Begin to write what `checkpoint_of` returned, after the checkpoint before it is on the disk.

        Raises:
            UserError: if that one could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(write_checkpoint, self.folder, content, keep_last=self.keep_last, best=best)

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait.

        Raises:
            UserError: saying what and which checkpoint is the last good one.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            UserError: if it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: object) -> None:
        # An error in the block is what the user has to hear of; one of the last write was to be had by `wait`.
        self._thread.shutdown(wait=True)
