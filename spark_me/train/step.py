"""One training step on one screen, and what it asks of a task."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spark_me.data.datasets import Batch
from spark_me.data.sampler import STEP, Share, seed_of
from spark_me.data.unreadable import UnreadableFiles
from spark_me.errors import UserError, listed
from spark_me.train import distributed
from spark_me.train.checkpoint import TrainState
from spark_me.train.distributed import SMALLEST_SCALE, Precision
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import Schedule


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

    def batches(self, share: Share, most_unreadable: int) -> Iterable[Batch]:
        """A process's micro-batches from a step to the end of the run."""

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


def split_batch(batch_size: int, processes: int, accumulate: int) -> int:
    """The micro-batch of a process, which gets as many images of a step as the others, in equal micro-batches.

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
    return batch_size // parts


NAMED = 4
"""Most images of a step that a message names."""


class Stepper:
    """Takes steps; every process takes each together with the others."""

    def __init__(
        self,
        task: Task,
        state: TrainState,
        schedule: Schedule,
        precision: Precision,
        *,
        seed: int,
        clip_norm: float | None,
    ) -> None:
        self.task = task
        self.state = state
        self.schedule = schedule
        self.precision = precision
        self.seed = seed
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        self.model: nn.Module = task.model
        if distributed.world_size() > 1:
            # Statistics of synchronised norms are equal on all processes already.
            self.model = DistributedDataParallel(task.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Take a step on this process's micro-batches; return its values by name.

        Raises:
            UserError: if the loss or its gradient is not finite; the step is not taken then.
        """
        state, step = self.state, self.state.step
        self.model.train()
        # What is drawn in a step depends on nothing before it: a resumed run draws the same.
        torch.manual_seed(seed_of(STEP, self.seed, step, distributed.rank()))
        inputs = [self.task.inputs(batch, step // self.task.steps_per_epoch) for batch in batches]
        self.schedule.apply(state.optimizer, step)
        state.optimizer.zero_grad()
        loss = self._backward(inputs)
        indices = [index for batch in batches for index in batch.indices]
        self._require_finite("loss", loss, indices)
        norm = self._update(indices)
        self.task.after_step()
        state.step += 1
        return {
            "loss": loss,
            "gradient_norm": norm,
            "lr": self.schedule.lr(step),
            "weight_decay": self.schedule.decay(step),
        }

    def _backward(self, inputs: Sequence[Inputs]) -> float:
        """Leave the gradient of the mean loss over all targets of the whole batch; return that loss."""
        (targets,) = distributed.all_reduce(sum(one.targets for one in inputs))
        losses = []
        for number, (tensors, count) in enumerate(inputs, 1):
            with self._exchange_held_back(last=number == len(inputs)):
                with self.precision.autocast:
                    loss = self.task.loss(self.model, *tensors)
                # A share of the whole batch's mean; DistributedDataParallel divides the sum by the processes.
                share = loss * (count / targets * distributed.world_size())
                self.precision.scaler.scale(share).backward()
            losses.append(loss.detach() * (count / targets))
        (mean,) = distributed.all_reduce(torch.stack(losses).sum(dtype=torch.float64).item())
        return mean

    def _exchange_held_back(self, *, last: bool) -> AbstractContextManager:
        """Processes exchange gradients once a step, with its last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _update(self, indices: Sequence[int]) -> float:
        """Clip the gradient and let the optimizer take it; return its norm."""
        scaler, optimizer = self.precision.scaler, self.state.optimizer
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.clip_norm).item()
        # A scaler leaves such a step out, and lowers its scale.
        if not scaler.is_enabled() or scaler.get_scale() < SMALLEST_SCALE:
            self._require_finite("gradient", norm, indices)
        scaler.step(optimizer)
        scaler.update()
        return norm

    def _require_finite(self, what: str, value: float, indices: Sequence[int]) -> None:
        if not math.isfinite(value):
            names = distributed.all_gather(self.task.image_names(indices))
            images = f" (images: {listed(names, NAMED)})" if names else ""
            raise distributed.shared(
                UserError(
                    f"the {what} is {value} at step {self.state.step + 1}{images}; the step was not taken: go on from "
                    "the last checkpoint by run.resume=ITS_PATH in another run.dir, with a lower learning rate or "
                    "train.precision=fp32"
                )
            )
