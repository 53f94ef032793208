"""The optimizer, and learning rate and weight decay as pure functions of the step; `spark-me schedule` shows them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from spark_me.config.data import ImagesConfig
from spark_me.config.loading import ON_THE_LINE, load_config
from spark_me.config.training import OptimConfig, TrainConfig
from spark_me.data.files import find_files
from spark_me.data.sampler import steps_of_epoch
from spark_me.errors import UserError
from spark_me.files import check_output
from spark_me.tables import text_table
from spark_me.train.optimizers import AdamW, Lamb
from spark_me.train.plots import save_figure


def full_rate(name: str) -> float:
    """The `lr_scale` of tasks in which all parameters learn alike."""
    return 1.0


def build_optimizer(
    model: nn.Module, optim: OptimConfig, lr_scale: Callable[[str], float] = full_rate, *, capturable: bool = False
) -> Optimizer:
    """LAMB or AdamW over groups; learning rate and weight decay are set by `Schedule.apply` before each step.

    Args:
        model: whose parameters are trained, on their device already.
        optim: which, and its options.
        lr_scale: parameter's name → its share of the learning rate.
        capturable: a CUDA graph can hold its step; learning rates and weight decay are tensors.
    """
    groups = parameter_groups(model, lr_scale)
    optimizer: Optimizer
    betas = (optim.betas[0], optim.betas[1])
    if optim.name == "lamb":
        optimizer = Lamb(groups, lr=0.0, betas=betas, capturable=capturable, **asdict(optim.lamb))
    else:
        # One kernel on GPUs. On the CPU, torch's fused one goes through memory in order whatever the strides: it is
        # silently wrong where those of a gradient are not its parameter's.
        on_gpu = all(parameter.is_cuda for parameter in model.parameters())
        optimizer = AdamW(groups, lr=0.0, betas=betas, capturable=capturable, fused=True if on_gpu else None)
    if capturable:
        for group in optimizer.param_groups:
            # Where there is no decay, it does not change.
            changing = ("lr", "weight_decay") if group["decayed"] else ("lr",)
            group |= {key: torch.zeros((), device=group["params"][0].device) for key in changing}
    optimizer.register_state_dict_post_hook(_make_numbers_plain)
    optimizer.register_load_state_dict_pre_hook(_keep_options)
    optimizer.register_load_state_dict_post_hook(_lay_out_averages)
    return optimizer


def _make_numbers_plain(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """A checkpoint does not tell whether a CUDA graph held the step."""
    for group in saved["param_groups"]:
        group |= {key: float(group[key]) for key in ("lr", "weight_decay")}


def _keep_options(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A run may go on from a checkpoint with another `optim`, or on another device: its own options count.

    Before loading: torch places the counts of steps by the options that it is given.
    """
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    options = [theirs | {key: own[key] for key in own if key not in ("params", "step")} for own, theirs in groups]
    return saved | {"param_groups": options}


def _lay_out_averages(optimizer: Optimizer) -> None:
    """In memory as their parameters, which a fused kernel demands; a checkpoint's are as its parameters were."""
    for parameter, state in optimizer.state.items():
        for key in state.keys() - {"step"}:
            state[key] = torch.empty_like(parameter).copy_(state[key])


def _decays(module: nn.Module, name: str) -> bool:
    """Whether a parameter is a weight: layer scales and mask tokens have several axes, too, but one of more than 1."""
    if isinstance(module, _ConvNd | nn.Linear):
        return name == "weight"
    return sum(size > 1 for size in getattr(module, name).shape) > 1


def parameter_groups(model: nn.Module, lr_scale: Callable[[str], float] = full_rate) -> list[dict[str, Any]]:
    """Parameters with weight decay, then those without: norms, biases, layer scales, other vectors and mask tokens.

    Args:
        model: whose parameters they are.
        lr_scale: parameter's name → its share of the learning rate. Each share has groups of its own.
    """
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    decays = {
        id(parameter): _decays(module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        groups.setdefault((decays[id(parameter)], lr_scale(name)), []).append(parameter)
    return [
        {"params": parameters, "decayed": decayed, "lr_scale": scale}
        for (decayed, scale), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


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
            _set(group, "lr", self.lr(step) * group.get("lr_scale", 1.0))
            _set(group, "weight_decay", self.decay(step) if group["decayed"] else 0.0)


def _set(group: dict[str, Any], key: str, value: float) -> None:
    """In place where it is a tensor: a CUDA graph reads it from there."""
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def build_schedule(optim: OptimConfig, train: TrainConfig, steps_per_epoch: int) -> Schedule:
    """The schedule of a run; the peak is lr, or base_lr · batch_size / 256."""
    steps = count_steps(train, steps_per_epoch)
    return Schedule(
        steps=steps,
        warmup_steps=_count_warmup_steps(optim, steps, steps_per_epoch),
        peak_lr=_peak_lr(optim, train.batch_size),
        warmup_start_factor=optim.warmup_start_factor,
        end_factor=optim.end_factor,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
    )


def count_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Length of a run."""
    if train.epochs is not None:
        return train.epochs * steps_per_epoch
    assert train.steps is not None  # one of the two is given
    return train.steps


def count_steps_per_epoch(images: int, data: ImagesConfig, batch_size: int) -> int:
    """Batches in an epoch of so many files.

    Raises:
        UserError: if there is not even one.
    """
    samples = images * data.repeats
    if samples < batch_size:
        raise UserError(
            f"train.batch_size={batch_size} is more than the {samples} images of an epoch "
            f"({images} files × data.repeats={data.repeats}): lower it, or raise data.repeats"
        )
    return steps_of_epoch(samples, batch_size, drop_last=data.drop_last)


def describe_peak(optim: OptimConfig, batch_size: int) -> str:
    """The optimizer and its highest learning rate, with the rule that it comes from."""
    base = optim.base_lr
    rule = "" if base is None else f" (base_lr {base:g} · {batch_size} / 256)"
    return f"{optim.name} with peak lr {_peak_lr(optim, batch_size):.3g}{rule}"


def _count_warmup_steps(optim: OptimConfig, steps: int, steps_per_epoch: int) -> int:
    if optim.warmup_epochs is not None:
        return round(optim.warmup_epochs * steps_per_epoch)
    assert optim.warmup_share is not None  # one of the two is given
    return round(optim.warmup_share * steps)


def _peak_lr(optim: OptimConfig, batch_size: int) -> float:
    if optim.lr is not None:
        return optim.lr
    assert optim.base_lr is not None  # one of the two is given
    return optim.base_lr * batch_size / 256


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))


COLUMNS = 3
"""Of the plot's panels, at most."""
POINTS = 1000
"""Of a curve, at most."""


class Planned(NamedTuple):
    """A configuration's schedule for so many images."""

    name: str
    peak: str
    """In words."""
    images: int
    steps_per_epoch: int
    schedule: Schedule


def report_schedules(configs: Sequence[Path], overrides: Sequence[str], images: int | None, plot: Path | None) -> None:
    """Print where each schedule begins, peaks and ends, and draw them if asked to.

    Args:
        configs: YAML files.
        overrides: `key=value`, for all of them.
        images: number of training images; None counts those of data.root.
        plot: PNG to write.

    Raises:
        UserError: for a wrong configuration, images that are not found or fewer than a batch, or a plot that cannot be
            written.
    """
    check_output(plot, *configs)
    plans = [_plan(path, overrides, images) for path in configs]
    for plan in plans:
        _print(plan)
    if plot is not None:
        _draw(plans, plot)
        print(f"wrote {plot}")


def _plan(path: Path, overrides: Sequence[str], images: int | None) -> Planned:
    config = load_config(path, overrides, unchecked=() if images is None else ("data.root", *ON_THE_LINE))
    if images is None:
        images = len(find_files(config.data, config.model.in_channels).train)
    steps_per_epoch = count_steps_per_epoch(images, config.data, config.train.batch_size)
    schedule = build_schedule(config.optim, config.train, steps_per_epoch)
    return Planned(path.stem, describe_peak(config.optim, config.train.batch_size), images, steps_per_epoch, schedule)


def _print(plan: Planned) -> None:
    schedule, each = plan.schedule, plan.steps_per_epoch
    print(f"{plan.name}: {plan.images} images, {each} steps an epoch, {schedule.steps} steps")
    print(f"  {plan.peak}")
    last = schedule.steps - 1
    places = {"first": 0, "warmed up": schedule.warmup_steps, "half-way": last // 2, "last": last}
    rows = [
        (name, str(step), f"{step / each:.1f}", f"{schedule.lr(step):.3g}", f"{schedule.decay(step):.4f}")
        for name, step in places.items()
    ]
    print(indent(text_table([("step", "number", "epoch", "lr", "decay"), *rows], "<>>>>"), "  "))


def _draw(plans: Sequence[Planned], path: Path) -> None:
    columns = min(COLUMNS, len(plans))
    rows = -(-len(plans) // columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for plan, axes in zip(plans, panels):
        _draw_panel(axes, plan)
    for axes in panels:  # those that are left
        axes.set_axis_off()
    save_figure(figure, path, dpi=100)


def _draw_panel(axes: Axes, plan: Planned) -> None:
    schedule = plan.schedule
    # Evenly spaced, with both ends and the peak.
    last = schedule.steps - 1
    steps = sorted({schedule.warmup_steps, *(round(last * index / POINTS) for index in range(POINTS + 1))})
    epochs = [step / plan.steps_per_epoch for step in steps]
    decay_axes = axes.twinx()
    axes.plot(epochs, [schedule.lr(step) for step in steps], color="tab:blue")
    decay_axes.plot(epochs, [schedule.decay(step) for step in steps], color="tab:orange", linestyle="--")
    axes.set_title(plan.name, fontsize=8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate", color="tab:blue")
    decay_axes.set_ylabel("weight decay", color="tab:orange")
    for each in (axes, decay_axes):
        each.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
