"""Learning rate and weight decay as pure functions of the step."""

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from spark_me.config_finetune import AnyConfig
from spark_me.config_schema import OptimConfig
from spark_me.data.sampler import steps_of_epoch
from spark_me.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine, for the learning rate; cosine over the whole run for weight decay.

    Steps count from 0; the last one is `steps` - 1.
    """

    steps: int
    warmup_steps: int
    peak_lr: float
    warmup_start_factor: float
    end_factor: float
    weight_decay: float
    weight_decay_end: float

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup_steps:
            start = self.warmup_start_factor
            return self.peak_lr * (start + (1 - start) * step / self.warmup_steps)
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.peak_lr * _cosine(1.0, self.end_factor, progress)

    def decay(self, step: int) -> float:
        """Weight decay of a step, for the parameters that have any."""
        return _cosine(self.weight_decay, self.weight_decay_end, step / max(1, self.steps - 1))

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set both in an optimizer made by `build_optimizer`."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(step) * group.get("lr_scale", 1.0)
            group["weight_decay"] = self.decay(step) if group["decayed"] else 0.0


def build_schedule(config: AnyConfig, steps_per_epoch: int) -> Schedule:
    """The schedule of a run; the peak is base_lr · batch_size / 256."""
    optim, steps = config.optim, count_steps(config, steps_per_epoch)
    return Schedule(
        steps=steps,
        warmup_steps=_count_warmup_steps(optim, steps, steps_per_epoch),
        peak_lr=_peak_lr(config),
        warmup_start_factor=optim.warmup_start_factor,
        end_factor=optim.end_factor,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
    )


def count_steps(config: AnyConfig, steps_per_epoch: int) -> int:
    """Length of a run."""
    train = config.train
    if train.epochs is not None:
        return train.epochs * steps_per_epoch
    assert train.steps is not None  # one of the two is given
    return train.steps


def count_steps_per_epoch(images: int, config: AnyConfig) -> int:
    """Batches in an epoch of so many files.

    Raises:
        UserError: if there is not even one.
    """
    samples, batch_size = images * config.data.repeats, config.train.batch_size
    if samples < batch_size:
        raise UserError(
            f"train.batch_size={batch_size} is more than the {samples} images of an epoch "
            f"({images} files × data.repeats={config.data.repeats}): lower it, or raise data.repeats"
        )
    return steps_of_epoch(samples, batch_size, drop_last=config.data.drop_last)


def describe_peak(config: AnyConfig) -> str:
    """The optimizer and its highest learning rate, with the rule that it comes from."""
    name, base, size = config.optim.name, config.optim.base_lr, config.train.batch_size
    return f"{name} with peak lr {_peak_lr(config):.3g} (base_lr {base:g} · {size} / 256)"


def _count_warmup_steps(optim: OptimConfig, steps: int, steps_per_epoch: int) -> int:
    if optim.warmup_epochs is not None:
        return round(optim.warmup_epochs * steps_per_epoch)
    assert optim.warmup_share is not None  # one of the two is given
    return round(optim.warmup_share * steps)


def _peak_lr(config: AnyConfig) -> float:
    return config.optim.base_lr * config.train.batch_size / 256


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))
