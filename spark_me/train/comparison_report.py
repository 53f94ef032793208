"""A comparison as a table and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from spark_me.files import atomic_write, write_text
from spark_me.train.comparison import FROM_SCRATCH, PRETRAINED, Row, deviation

HEADER = ("labels", "images", PRETRAINED, FROM_SCRATCH, "difference", "ranges of the seeds")
VERDICTS = {"better": "apart", "worse": "apart, scratch is better", "overlap": "overlap"}
COLOURS = {PRETRAINED: "tab:blue", FROM_SCRATCH: "tab:orange"}


def format_table(rows: Sequence[Row]) -> str:
    """For the screen."""
    cells = [HEADER, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def format_markdown(rows: Sequence[Row], path: Path) -> None:
    """Write the same table in Markdown."""
    lines = [HEADER, ("---:",) * len(HEADER), *map(_cells, rows)]
    write_text(path, "".join(f"| {' | '.join(line)} |\n" for line in lines))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot top-1 over the share of the labels: means, every run as a point."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for start in (PRETRAINED, FROM_SCRATCH):
        accuracies = [_of(row, start) for row in rows]
        shares = [row.fraction for row in rows]
        axes.plot(shares, [mean(values) for values in accuracies], color=COLOURS[start], marker="o", label=start)
        for share, values in zip(shares, accuracies):
            axes.plot([share] * len(values), values, ".", color=COLOURS[start], alpha=0.5)
    axes.set_xscale("log")
    axes.set_xticks([row.fraction for row in rows], [f"{_percent(row)}\n{row.images} images" for row in rows])
    axes.minorticks_off()
    axes.set(xlabel="share of the labels", ylabel="top-1 on the validation images", title="Fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _cells(row: Row) -> tuple[str, ...]:
    accuracies = [_spread(_of(row, start), "%") for start in (PRETRAINED, FROM_SCRATCH)]
    return _percent(row), str(row.images), *accuracies, _spread(row.gains, "", "+"), VERDICTS[row.verdict]


def _percent(row: Row) -> str:
    return f"{100 * row.fraction:.4g} %"


def _of(row: Row, start: str) -> list[float]:
    return row.pretrained if start == PRETRAINED else row.scratch


def _spread(values: Sequence[float], unit: str, sign: str = "") -> str:
    """Mean and standard deviation in percent or percentage points."""
    spread = deviation(values)
    text = f"{100 * mean(values):{sign}.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
    return f"{text} {unit}".rstrip()
