"""Pictures of a run: the loss over the steps, and photos reconstructed from their visible pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from spark_me.files import atomic_write

TRAIN_COLOUR, HELD_OUT_COLOUR = "tab:blue", "tab:orange"
COLUMNS = ("original", "visible pixels", "reconstruction")
HIDDEN_GREY = 0.5


def plot_loss(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training and held-out loss over the steps, with the line that predicting nothing scores."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    train = [(entry["step"], entry["loss"]) for entry in metrics if "loss" in entry]
    held_out = [(entry["step"], entry["held_out_loss"]) for entry in metrics if "held_out_loss" in entry]
    if train:
        steps, losses = zip(*train)
        axes.plot(steps, losses, color=TRAIN_COLOUR, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth(losses), color=TRAIN_COLOUR, label="training (running mean)")
    if held_out:
        axes.plot(*zip(*held_out), color=HELD_OUT_COLOUR, marker=".", label="held-out images")
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="predicting nothing scores 1.0")
    axes.set(xlabel="step", ylabel="loss (squared error of normalised hidden pixels)", title="Pretraining loss")
    axes.set_ylim(bottom=0)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_reconstruction(originals: Tensor, predictions: Tensor, shown: Tensor, path: Path) -> None:
    """Draw a row for each image: original, visible pixels, reconstruction with the visible pixels pasted in.

    Args:
        originals: [B, C, H, W] in 0 to 1.
        predictions: [B, C, H, W] in 0 to 1.
        shown: bool [B, H, W], which pixels are visible.
        path: PNG to write.
    """
    mask = shown[:, None]
    pasted = torch.where(mask, originals, predictions)
    grey = torch.where(mask, originals, torch.full_like(originals, HIDDEN_GREY))
    rows, _, height, width = originals.shape
    side = 2.6
    figure = Figure(figsize=(3 * side, rows * side * height / width + 0.6), layout="constrained")
    for row, images in zip(figure.subplots(rows, 3, squeeze=False), zip(originals, grey, pasted)):
        for axes, image in zip(row, images):
            axes.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
    for axes, title in zip(figure.axes, COLUMNS):
        axes.set_title(title)
    figure.supxlabel("A hidden patch is predicted up to its mean and contrast, which are the original's.", fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def smooth(values: Sequence[float]) -> np.ndarray:
    """Mean of the last 5 % of values, at each of them."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([np.zeros(1), np.asarray(values)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
