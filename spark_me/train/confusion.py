"""The picture of which classes are taken for which."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from spark_me.errors import shown
from spark_me.files import atomic_write

NAMED = 40
"""Most classes whose names are written on the axes."""
LONGEST_NAME = 24
"""Characters of a name there."""
NUMBERED = 15
"""Most classes whose counts are written in the squares."""


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix; colours are shares of the true class.

    Args:
        confusion: [true class][predicted class], images.
        classes: their names.
        path: PNG to write.
    """
    counts = np.asarray(confusion)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = min(12.0, max(4.5, 0.35 * len(classes) + 2))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class", title="Share of the true class")
    figure.colorbar(image, ax=axes, shrink=0.8)
    if len(classes) <= NAMED:
        names = [shown(name, LONGEST_NAME) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(classes)), names, parse_math=False)
    if len(classes) <= NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    with atomic_write(path) as file, warnings.catch_warnings():
        # matplotlib's font has no Chinese, for example: the name is drawn with boxes.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        figure.savefig(file, format="png", dpi=120)
