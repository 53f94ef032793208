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
from spark_me.data.sampler import INPUTS, STEP, Share, seed_of
from spark_me.data.unreadable import UnreadableFiles
from spark_me.devices import Readback
from spark_me.errors import UserError, listed
from spark_me.train import distributed
from spark_me.train.checkpoint import TrainState
from spark_me.train.distributed import SMALLEST_SCALE, Precision
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import Schedule


class Inputs(NamedTuple):
    """A micro-batch, ready for the loss."""

    tensors: tuple[Tensor, ...]
    """What `Task.loss` takes, each where it is needed."""
    targets: int
    """How many targets its loss is the mean of, for example hidden patches or labelled images."""


class Task(Protocol):
    """A model and what it is trained for."""

    name: str
    """Of the command and of its checkpoints."""
    files: int
    """Number of files, training and held-out."""
    graph_obstacle: str
    """Why no CUDA graph can hold its steps; empty where one can."""
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

    def inputs(self, batch: Batch) -> Inputs:
        """What is computed from a micro-batch; its images are on their way to the model's device."""

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


class Prepared(NamedTuple):
    """This process's part of a step that is to come."""

    micro_batches: list[Inputs]
    indices: list[int]
    """Of the samples in it."""

    @property
    def targets(self) -> int:
        """Of all micro-batches."""
        return sum(one.targets for one in self.micro_batches)


class Taken(NamedTuple):
    """A step that was taken, or that a GPU is still computing."""

    step: int
    """Steps done with it."""
    indices: list[int]
    """Of this process's samples."""
    values: Readback
    """This process's share of the loss over all targets, and the norm of the gradient."""


class Stepper:
    """Takes steps; every process takes each together with the others. The host waits for no GPU."""

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
        self.compute = self._compute
        """What a device does in a step: from its micro-batches and all targets to loss and norm, float64 [2]."""
        self.copies = torch.cuda.Stream(precision.device) if precision.device.type == "cuda" else None
        """Images travel on it while the step before is computed."""

    def prepare(self, batches: Sequence[Batch]) -> Prepared:
        """Bring what the next step is computed from to its device."""
        torch.manual_seed(seed_of(INPUTS, self.seed, self.state.step, distributed.rank()))
        with torch.cuda.stream(self.copies):  # of None, does nothing
            inputs = [self.task.inputs(batch) for batch in batches if batch.indices]
        return Prepared(inputs, [index for batch in batches for index in batch.indices])

    def take(self, prepared: Prepared, targets: float) -> Taken:
        """Take a step.

        Args:
            prepared: this process's part of it.
            targets: how many there are in the parts of all processes.
        """
        state, step = self.state, self.state.step
        self.model.train()
        # What is drawn in a step depends on nothing before it: a resumed run draws the same.
        torch.manual_seed(seed_of(STEP, self.seed, step, distributed.rank()))
        self._await_copies(prepared)
        self.schedule.apply(state.optimizer, step)
        values = self.compute(prepared.micro_batches, targets)
        self.task.after_step()
        state.step += 1
        return Taken(state.step, prepared.indices, Readback(values))

    def _await_copies(self, prepared: Prepared) -> None:
        if self.copies is None:
            return
        current = torch.cuda.current_stream(self.precision.device)
        current.wait_stream(self.copies)
        for tensor in (tensor for one in prepared.micro_batches for tensor in one.tensors if tensor.is_cuda):
            tensor.record_stream(current)  # or its memory might be given to the next step's images too early

    def _compute(self, inputs: Sequence[Inputs], targets: float) -> Tensor:
        self.state.optimizer.zero_grad()
        loss = self._backward(inputs, targets)
        norm = self._update()
        return torch.stack([loss, norm.to(loss)])

    def _backward(self, inputs: Sequence[Inputs], targets: float) -> Tensor:
        """Leave the gradient of the mean loss over all targets of the whole batch; return this process's share of it.

        Returns:
            float64 [].
        """
        shares = []
        for number, (tensors, count) in enumerate(inputs, 1):
            with self._exchange_held_back(last=number == len(inputs)):
                with self.precision.autocast:
                    loss = self.task.loss(self.model, *tensors)
                # A share of the whole batch's mean; DistributedDataParallel divides the sum by the processes.
                share = loss * (count / targets * distributed.world_size())
                self.precision.scaler.scale(share).backward()
            shares.append(loss.detach() * (count / targets))
        return torch.stack(shares).sum(dtype=torch.float64)

    def _exchange_held_back(self, *, last: bool) -> AbstractContextManager:
        """Processes exchange gradients once a step, with its last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _update(self) -> Tensor:
        """Clip the gradient and let the optimizer take it, unless fp16's scaler leaves it out; return its norm, []."""
        scaler, optimizer = self.precision.scaler, self.state.optimizer
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        return norm

    def require_finite(self, taken: Taken, loss: float, norm: float) -> None:
        """Refuse to go on from a step whose loss or gradient is not finite. Every process calls it.

        Raises:
            UserError: naming the step and its images.
        """
        what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient", norm)
        scaler = self.precision.scaler
        # A scaler leaves a step out whose gradient is not finite, and lowers its scale.
        left_out = what == "gradient" and scaler.is_enabled() and scaler.get_scale() >= SMALLEST_SCALE
        if math.isfinite(value) or left_out:
            return
        names = distributed.all_gather(self.task.image_names(taken.indices))
        images = f" (images: {listed(names, NAMED)})" if names else ""
        raise distributed.shared(
            UserError(
                f"the {what} is {value} at step {taken.step}{images}; nothing was saved since: go on from the last "
                "checkpoint by run.resume=ITS_PATH in another run.dir, with a lower learning rate or "
                "train.precision=fp32"
            )
        )


NAMED = 4
"""Most images of a step that a message names."""
