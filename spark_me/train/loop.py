"""The training loop on one screen."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spark_me.data.datasets import Batch
from spark_me.data.unreadable import UnreadableFiles
from spark_me.errors import UserError
from spark_me.masking import draw_visible_of_samples
from spark_me.train.checkpoint import TrainState
from spark_me.train.data_wait import timed
from spark_me.train.schedules import Schedule

OnStep = Callable[[dict[str, float], int], None]
"""Called after a step with its values by name and its number of images."""


def train(
    state: TrainState,
    batches: Iterable[Batch],
    schedule: Schedule,
    unreadable: UnreadableFiles,
    *,
    steps_per_epoch: int,
    seed: int,
    clip_norm: float | None,
    device: torch.device,
    autocast: torch.autocast,
    on_step: OnStep,
) -> None:
    """Train on batches, of which the first is that of step `state.step`.

    Raises:
        UserError: if the loss or its gradient is not finite (before the step), or too many files are unreadable.
    """
    model = state.model
    model.train()
    for batch, data_wait in timed(batches):
        unreadable.add(batch.unreadable)
        if not batch.indices:
            raise UserError(f"none of the images of step {state.step + 1} is readable: run `spark-me data check`")
        epoch = state.step // steps_per_epoch
        visible = draw_visible_of_samples(seed, epoch, batch.indices, model.grid, model.mask_ratio, batch.valid)
        schedule.apply(state.optimizer, state.step)
        with autocast:
            valid = None if batch.valid is None else batch.valid.to(device, non_blocking=True)
            loss = model(batch.images.to(device, non_blocking=True), visible.to(device), valid)
        gradient_norm = _backward(state, loss, clip_norm)
        state.optimizer.step()
        state.step += 1
        values = {"loss": loss.item(), "gradient_norm": gradient_norm, "lr": schedule.lr(state.step - 1)}
        values["data_wait"] = data_wait
        on_step({**values, "weight_decay": schedule.decay(state.step - 1)}, len(batch.indices))


def _backward(state: TrainState, loss: Tensor, clip_norm: float | None) -> float:
    """Compute and clip the gradient; return its norm."""
    _require_finite("loss", loss.item(), state.step)
    state.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), math.inf if clip_norm is None else clip_norm).item()
    _require_finite("gradient", norm, state.step)
    return norm


def _require_finite(what: str, value: float, steps_done: int) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"the {what} is {value} at step {steps_done + 1}; the step was not taken: go on from the last "
            "checkpoint by run.resume=ITS_PATH in another run.dir, with a lower optim.base_lr or train.precision=fp32"
        )
