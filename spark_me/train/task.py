"""What the trainer asks of a task. It runs steps, checkpoints and logs; the task says what is learnt from what."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from spark_me.data.datasets import Batch
from spark_me.data.unreadable import UnreadableFiles
from spark_me.errors import UserError
from spark_me.train.run_directory import RunDirectory


class Inputs(NamedTuple):
    """A micro-batch, ready for the loss."""

    tensors: tuple[Tensor, ...]
    """On the CPU; what `Task.loss` takes, and brings to its device where it is needed there."""
    targets: int
    """How many targets its loss is the mean of, for example hidden patches or labelled images."""


class Task(Protocol):
    """A model and what it is trained for."""

    name: str
    """Of the command and of its checkpoints."""
    files: int
    """Number of files, training and held-out."""
    data_fingerprint: str
    """Changes when the training data do."""
    steps_per_epoch: int
    best_by: str
    """The value of `evaluate` that decides which checkpoint is the best."""
    best_is_highest: bool
    """Whether its highest does, not its lowest."""

    @property
    def model(self) -> nn.Module:
        """What is trained and saved, on its device."""

    def batches(self, first_step: int, most_unreadable: int) -> Iterable[Batch]:
        """This process's micro-batches from a step to the end of the run, `train.accumulate` for each step."""

    def image_names(self, indices: Sequence[int]) -> list[str]:
        """Of samples of an epoch, for messages; empty where images have no names before they are read."""

    def inputs(self, batch: Batch, epoch: int) -> Inputs:
        """What is computed from a micro-batch."""

    def loss(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        """The mean loss over the targets; `model` is `self.model`, perhaps in a wrapper that shares its gradients."""

    def lr_scale(self, name: str, /) -> float:
        """The share of the learning rate for a parameter of the model."""

    def after_step(self) -> None:
        """What else a step changes, when the optimizer is done."""

    def evaluate(self, unreadable: UnreadableFiles, autocast: torch.autocast) -> dict[str, float]:
        """Values on held-out data, by name; empty without such data. Called on all processes, with equal results."""

    def draw(self, run: RunDirectory, step: int) -> None:
        """Draw how far the run is after so many steps, into its directory."""

    def entries(self) -> dict[str, Any]:
        """What a checkpoint holds besides what every task's does, by name."""

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Bring that back from a checkpoint's content.

        Raises:
            UserError: if it does not fit.
        """


def require_even_split(batch_size: int, processes: int, accumulate: int) -> None:
    """Check that every process gets as many images of a step as the others, in equal micro-batches.

    Raises:
        UserError: naming the nearest batch sizes that do split.
    """
    parts = processes * accumulate
    below = batch_size // parts * parts
    if below != batch_size:
        nearest = f"{below} and {below + parts}" if below else str(parts)
        raise UserError(
            f"train.batch_size={batch_size} does not split evenly over {processes} processes × "
            f"train.accumulate={accumulate}: the nearest that does is {nearest}"
        )
