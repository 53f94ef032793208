"""What the trainer asks of a task. It runs steps, checkpoints and logs; the task says what is learnt from what."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from spark_me.data.datasets import Batch
from spark_me.data.unreadable import UnreadableFiles
from spark_me.train.run_directory import RunDirectory


class Inputs(NamedTuple):
    """A micro-batch, ready for the loss."""

    tensors: tuple[Tensor, ...]
    """On the CPU; what `Task.loss` takes."""
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
    """The value of `evaluate` whose lowest makes the best checkpoint."""

    @property
    def model(self) -> nn.Module:
        """What is trained and saved, on its device."""

    def batches(self, first_step: int, most_unreadable: int) -> Iterable[Batch]:
        """This process's micro-batches from a step to the end of the run, `train.accumulate` for each step."""

    def inputs(self, batch: Batch, epoch: int) -> Inputs:
        """What is computed from a micro-batch."""

    def loss(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        """The mean loss over the targets; `model` is `self.model`, perhaps in a wrapper that shares its gradients."""

    def evaluate(self, unreadable: UnreadableFiles, autocast: torch.autocast) -> dict[str, float]:
        """Values on held-out data, by name; empty without such data. Called on all processes, with equal results."""

    def draw(self, run: RunDirectory) -> None:
        """Draw how far the run is, into its directory."""
