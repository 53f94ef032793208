"""One training step on one screen: the whole batch's gradient, over micro-batches and processes."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spark_me.data.datasets import Batch
from spark_me.data.randomness import STEP, seed_of
from spark_me.errors import UserError
from spark_me.train import distributed
from spark_me.train.checkpoint import TrainState
from spark_me.train.precision import SMALLEST_SCALE, Precision
from spark_me.train.schedules import Schedule
from spark_me.train.task import Inputs, Task

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
        (targets,) = distributed.total(sum(one.targets for one in inputs))
        losses = []
        for number, (tensors, count) in enumerate(inputs, 1):
            with self._exchange_held_back(last=number == len(inputs)):
                with self.precision.autocast:
                    loss = self.task.loss(self.model, *tensors)
                # A share of the whole batch's mean; DistributedDataParallel divides the sum by the processes.
                share = loss * (count / targets * distributed.world_size())
                self.precision.scaler.scale(share).backward()
            losses.append(loss.detach() * (count / targets))
        (mean,) = distributed.total(torch.stack(losses).sum(dtype=torch.float64).item())
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
            names = distributed.everyones(self.task.image_names(indices))
            shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" * (len(names) > NAMED))
            images = f" (images: {shown})" if shown else ""
            raise distributed.shared(
                UserError(
                    f"the {what} is {value} at step {self.state.step + 1}{images}; the step was not taken: go on from "
                    "the last checkpoint by run.resume=ITS_PATH in another run.dir, with a lower optim.base_lr or "
                    "train.precision=fp32"
                )
            )
