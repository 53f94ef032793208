"""Curves of a fine-tuning run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from spark_me.files import atomic_write
from spark_me.train.plots import HELD_OUT_COLOUR, TRAIN_COLOUR, smooth

EMA_COLOUR = "tab:green"


def plot_finetuning(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses over the steps, and under them top-1 on the validation images."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    if train := _values(metrics, "loss"):
        steps, values = zip(*train)
        losses.plot(steps, smooth(values), color=TRAIN_COLOUR, label="training, on augmented images (running mean)")
    for prefix, name, colour in (("", "", HELD_OUT_COLOUR), ("ema_", ", averaged weights", EMA_COLOUR)):
        for axes, measure in ((losses, "loss"), (accuracies, "top1")):
            if held_out := _values(metrics, f"held_out_{prefix}{measure}"):
                axes.plot(*zip(*held_out), color=colour, marker=".", label=f"validation images{name}")
    losses.set(ylabel="loss", title="Fine-tuning")
    accuracies.set(xlabel="step", ylabel="top-1", ylim=(0, 1))
    for axes in (losses, accuracies):
        if axes.lines:
            axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _values(metrics: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in metrics if entry.get(name) is not None]
