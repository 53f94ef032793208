"""Pictures of a run: the loss over the steps, and photos reconstructed from their visible pixels."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from spark_me.errors import shown
from spark_me.files import atomic_write

TRAIN_COLOUR, HELD_OUT_COLOUR = "tab:blue", "tab:orange"
COLUMNS = ("original", "visible pixels", "reconstruction")

Colour: TypeAlias = tuple[float, float, float]
# Rare in photos, and of such different lightness that they are told apart in any colour vision.
HIDDEN_COLOUR: Colour = (0.5, 0.5, 0.5)
NODATA_COLOUR: Colour = (1.0, 0.69, 0.0)
UNPREDICTED_COLOUR: Colour = (0.24, 0.12, 0.66)

# Inches.
SIDE, GAP, MARGIN, TITLE, LINE = 2.6, 0.08, 0.12, 0.32, 0.22
# Points.
LARGE, MEDIUM, SMALL = 11, 10, 8
LONGEST_NAME = 48
"""Characters, so that even the widest leave room for the loss."""


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
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a PNG.

    Raises:
        UserError: if it cannot be written.
    """
    with atomic_write(path) as file, warnings.catch_warnings():
        # Of names in scripts that matplotlib's font lacks, Chinese for example; they are drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        figure.savefig(file, format="png", dpi=dpi)


class Row(NamedTuple):
    """An image in the picture of reconstructions.

    A pixel in none of the masks has data, but a nodata pixel lies in its patch.
    """

    name: str
    loss: float
    original: Tensor
    """Float [1 or 3, H, W] in 0 to 1."""
    prediction: Tensor
    """The same; counts where `predicted`."""
    visible: Tensor
    """bool [H, W]."""
    predicted: Tensor
    """bool [H, W], the pixels of hidden patches."""
    without_data: Tensor
    """bool [H, W]."""


def plot_reconstruction(rows: Sequence[Row], title: str, notes: Sequence[str], path: Path) -> None:
    """Write `reconstruction_figure` as a PNG.

    Raises:
        UserError: if it cannot be written.
    """
    save_figure(reconstruction_figure(rows, title, notes), path)


def reconstruction_figure(rows: Sequence[Row], title: str, notes: Sequence[str]) -> Figure:
    """Draw a row for each image: original, visible pixels, reconstruction with the visible pixels pasted in.

    Args:
        rows: one at least; their images have one shape.
        title: one line.
        notes: small lines below the pictures.
    """
    height, width = rows[0].visible.shape
    side = SIDE * height / width
    of_row = GAP + LINE + side
    page = (
        2 * MARGIN + 3 * SIDE + 2 * GAP,
        2 * MARGIN + TITLE + LINE + len(rows) * of_row + GAP + (1 + len(notes)) * LINE,
    )
    figure = Figure(figsize=page)

    def write(x: float, y: float, text: str, **properties: Any) -> None:
        """Write a line whose middle lies x, y inches from the page's upper left corner."""
        place = {"x": x / page[0], "y": 1 - y / page[1], "va": "center", "parse_math": False}
        figure.text(s=text, **{"fontsize": SMALL, **place, **properties})

    lefts = [MARGIN + column * (SIDE + GAP) for column in range(3)]
    write(page[0] / 2, MARGIN + TITLE / 2, title, ha="center", fontsize=LARGE)
    y = MARGIN + TITLE
    for left, name in zip(lefts, COLUMNS):
        write(left + SIDE / 2, y + LINE / 2, name, ha="center", fontsize=MEDIUM)
    y += LINE
    for row in rows:
        y += GAP
        write(MARGIN, y + LINE / 2, shown(row.name, LONGEST_NAME), ha="left")
        write(page[0] - MARGIN, y + LINE / 2, f"loss {row.loss:.4f}", ha="right")
        y += LINE + side
        for left, image in zip(lefts, paint(row)):
            axes = figure.add_axes((left / page[0], 1 - y / page[1], SIDE / page[0], side / page[1]))
            axes.imshow(image.permute(1, 2, 0).numpy(), aspect="auto")
            axes.set_axis_off()
    y += GAP + LINE / 2
    keys = [Rectangle((0, 0), 1, 1, facecolor=colour, label=name) for name, colour in _colours_in(rows).items()]
    middle = (0.5, 1 - y / page[1])
    figure.legend(
        handles=keys, ncols=len(keys), fontsize=SMALL, frameon=False, loc="center", bbox_to_anchor=middle, borderpad=0
    )
    for number, note in enumerate(notes, start=1):
        write(page[0] / 2, y + number * LINE, note, ha="center")
    return figure


def paint(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """The row's three pictures, RGB [3, H, W]: original, visible pixels, reconstruction."""
    original, prediction = (image.expand(3, -1, -1) for image in (row.original, row.prediction))

    def fill(image: Tensor, mask: Tensor, colour: Colour) -> Tensor:
        return torch.where(mask, torch.tensor(colour, dtype=image.dtype).view(3, 1, 1), image)

    known = fill(fill(original, _unpredicted(row), UNPREDICTED_COLOUR), row.without_data, NODATA_COLOUR)
    return (
        fill(original, row.without_data, NODATA_COLOUR),
        fill(known, row.predicted, HIDDEN_COLOUR),
        torch.where(row.predicted, prediction, known),
    )


def _colours_in(rows: Sequence[Row]) -> dict[str, Colour]:
    masks = {
        ("hidden", HIDDEN_COLOUR): [row.predicted for row in rows],
        ("no data", NODATA_COLOUR): [row.without_data for row in rows],
        ("not predicted: its patch has pixels without data", UNPREDICTED_COLOUR): [_unpredicted(row) for row in rows],
    }
    return {name: colour for (name, colour), own in masks.items() if any(mask.any() for mask in own)}


def _unpredicted(row: Row) -> Tensor:
    """bool [H, W], pixels with data in patches that are neither visible nor predicted."""
    return ~(row.visible | row.predicted | row.without_data)


def smooth(values: Sequence[float]) -> np.ndarray:
    """Mean of the last 5 % of values, at each of them."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([np.zeros(1), np.asarray(values)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
