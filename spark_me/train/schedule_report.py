"""`spark-me schedule`: learning rate and weight decay of configurations before they are run, as a table and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spark_me.config import ON_THE_LINE, Config, load_config
from spark_me.data.files import find_files
from spark_me.files import atomic_write, check_output
from spark_me.train.schedules import Schedule, build_schedule, count_steps_per_epoch, describe_peak

COLUMNS = 3
"""Of the plot's panels, at most."""
POINTS = 1000
"""Of a curve, at most."""


class Planned(NamedTuple):
    """A configuration's schedule for so many images."""

    name: str
    config: Config
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
    steps_per_epoch = count_steps_per_epoch(images, config)
    return Planned(path.stem, config, images, steps_per_epoch, build_schedule(config, steps_per_epoch))


def _print(plan: Planned) -> None:
    schedule, each = plan.schedule, plan.steps_per_epoch
    print(f"{plan.name}: {plan.images} images, {each} steps an epoch, {schedule.steps} steps")
    print(f"  {describe_peak(plan.config)}")
    last = schedule.steps - 1
    places = {"first": 0, "warmed up": schedule.warmup_steps, "half-way": last // 2, "last": last}
    print(f"  {'step':<9} {'number':>8} {'epoch':>8} {'lr':>10} {'decay':>7}")
    for name, step in places.items():
        print(f"  {name:<9} {step:>8} {step / each:>8.1f} {schedule.lr(step):>10.3g} {schedule.decay(step):>7.4f}")


def _draw(plans: Sequence[Planned], path: Path) -> None:
    columns = min(COLUMNS, len(plans))
    rows = -(-len(plans) // columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for plan, axes in zip(plans, panels):
        _draw_panel(axes, plan)
    for axes in panels:  # those that are left
        axes.set_axis_off()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


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
