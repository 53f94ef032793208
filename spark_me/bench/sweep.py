"""How cost grows with one property of the case, and the largest batch that fits into a GPU."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spark_me.bench.case import Case
from spark_me.bench.results import Report
from spark_me.bench.timing import Advance, is_out_of_memory, kind_and_line, measure, release_memory
from spark_me.bench.workloads import BACKENDS, Variant, Workload, variants_of
from spark_me.errors import EngineError, UserError
from spark_me.machine import Machine, describe_machine

SWEEPS: dict[str, tuple[float, ...]] = {
    # visible shares from 0.1 to 1.0
    "mask_ratio": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
    "batch": (1, 2, 4, 8, 16),
    "image_size": (128, 192, 256, 320, 384),
}
"""What can be swept, and through which values by default."""


@dataclass(frozen=True)
class Line:
    """The least-squares straight line through seconds over visible share."""

    intercept: float
    """Seconds at share 0."""
    slope: float
    """Seconds for all patches, without the intercept."""
    deviation: float
    """Largest distance of a measured point from the line, as a share of the line."""


@dataclass(frozen=True)
class Sweep:
    """A case measured at several values of one of its properties."""

    name: str
    values: list[float]
    reports: list[Report]

    def shares(self) -> list[float]:
        """Visible share of each report."""
        return [report.visible_patches / report.patches for report in self.reports]

    def medians(self, scope: str, backend: str) -> list[float]:
        """Seconds of a backend in each report, in its fastest mode; empty if it did not run."""
        rows = [
            result.fastest_row(backend) for report in self.reports for result in report.scopes if result.scope == scope
        ]
        return [row.median for row in rows if row is not None]

    def line(self, scope: str, backend: str = "native") -> Line | None:
        """Fit of time over visible share; None for another sweep, too few shares, or a backend that did not run."""
        seconds = self.medians(scope, backend)
        if self.name != "mask_ratio" or not seconds or len(set(self.shares())) < 3:
            return None
        return fit_line(self.shares(), seconds)

    def as_dict(self) -> dict[str, Any]:
        """All figures, with the fitted line of each scope, for JSON."""
        scopes = [result.scope for result in self.reports[0].scopes]
        lines = {scope: line and dataclasses.asdict(line) for scope in scopes for line in [self.line(scope)]}
        return {**dataclasses.asdict(self), "native_lines": lines}


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line of least squared relative distances, and how far the points stray from it.

    Distances count relative to the points, as they are reported: times span a factor of ten, and in plain least squares
    the largest would decide.
    """
    slope, intercept = np.polyfit(x, y, 1, w=1 / np.asarray(y))
    line = intercept + slope * np.asarray(x)
    return Line(float(intercept), float(slope), float(np.max(np.abs(np.asarray(y) - line) / line)))


def cases_of(case: Case, name: str, values: Sequence[float], scopes: Sequence[str]) -> list[Case]:
    """The case at each value, all of them checked.

    Raises:
        UserError: for an unknown property or a value that does not fit.
    """
    if name not in SWEEPS:
        raise UserError(f"unknown sweep {name!r}: choose one of {', '.join(SWEEPS)}")
    cases = [dataclasses.replace(case, **{name: _typed(name, value)}) for value in values]
    for each in cases:
        each.check(scopes)
    return cases


def sweep(case: Case, name: str, values: Sequence[float], scopes: Sequence[str], **options: Any) -> Iterator[Sweep]:
    """Measure the case at each value, yielding the sweep so far after each of them.

    Args:
        case: everything that stays the same.
        name: the property that varies, a key of `SWEEPS`.
        values: what it becomes; an image size is the side of a square.
        scopes: "encoder", "step" or both.
        options: the other arguments of `measure`.

    Raises:
        UserError: for an unknown property or a value that does not fit, before anything is measured.
    """
    reports: list[Report] = []
    for each in cases_of(case, name, values, scopes):
        reports.append(measure(each, scopes, **options))
        yield Sweep(name, list(values[: len(reports)]), list(reports))


def _typed(name: str, value: float) -> Any:
    if name == "mask_ratio":
        return float(value)
    if not float(value).is_integer():
        raise UserError(f"--values {value:g}: a sweep over {name} takes whole numbers")
    return int(value) if name == "batch" else (int(value), int(value))


STEP = 8
"""Batches are tried in multiples of this."""


@dataclass(frozen=True)
class LargestBatch:
    """Of one backend."""

    backend: str
    memory_format: str | None
    batch: int
    """0 if not even the smallest fits."""
    limit: str
    """What stopped the next larger one."""


@dataclass(frozen=True)
class LargestBatches:
    """Of several backends, none compiled: a compiler would start anew with every batch."""

    machine: Machine
    case: Case
    """Its batch is where the search began."""
    scope: str
    gpu_bytes: int
    """Memory of the GPU."""
    largest: list[LargestBatch]


def find_largest_batches(
    case: Case, scope: str, backends: Sequence[str], advance: Advance = lambda label: None
) -> LargestBatches:
    """Search for the largest batch of each backend, dense ones in channels_last.

    Weights and their gradients are in memory too, an optimizer is not.

    Args:
        case: what is computed; the search begins at its batch.
        scope: "encoder" or "step".
        backends: of `BACKENDS`.
        advance: told each batch before it is tried.

    Raises:
        UserError: for a case that does not fit, and on a CPU.
    """
    case.check([scope])
    if case.device != "cuda":
        raise UserError("--largest-batch asks how much fits into a GPU: add --device cuda")
    variants = [variant for variant in variants_of(backends) if variant.memory_format != "contiguous"]
    largest = [_largest_of(case, scope, variant, advance) for variant in variants]
    with case.computing():
        machine = describe_machine(case.device)
    return LargestBatches(machine, case, scope, torch.cuda.get_device_properties(0).total_memory, largest)


def search(fits: Callable[[int], bool], first: int = STEP) -> int:
    """The largest multiple of `STEP` that fits, 0 if none does: doubled until it does not, then bisected.

    Args:
        fits: whether a batch does; if one does not, no larger one does.
        first: where to begin.
    """
    below, above = 0, max(1, first // STEP)  # in multiples of STEP
    while fits(above * STEP):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle * STEP) else (below, middle)
    return below * STEP


def _largest_of(case: Case, scope: str, variant: Variant, advance: Advance) -> LargestBatch:
    workload = Workload(dataclasses.replace(case, batch=2), scope, variant)
    limits = ["memory"]

    def fits(batch: int) -> bool:
        advance(f"{variant}, batch {batch}")
        try:
            workload.run(workload.inputs(dataclasses.replace(case, batch=batch)))
        except (RuntimeError, EngineError) as error:
            limits.append("memory" if is_out_of_memory(error) else kind_and_line(error))
            return False
        finally:
            workload.clear()
            release_memory()
        return True

    batch = search(fits, case.batch)
    return LargestBatch(variant.backend, variant.memory_format, batch, limits[-1])


_AXIS = {"mask_ratio": "visible share of the patches", "batch": "images in a batch", "image_size": "image side, pixels"}


def draw_sweep(sweep: Sweep) -> bytes:
    """A PNG with one panel a scope and one curve a backend: seconds of a pass over what was swept."""
    scopes = [result.scope for result in sweep.reports[0].scopes]
    figure = Figure(figsize=(6.4 * len(scopes), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, scope in zip(figure.subplots(1, len(scopes), squeeze=False)[0], scopes):
        _draw_scope(axes, sweep, scope)
    case = sweep.reports[0].case
    figure.suptitle(f"{case.encoder}, {case.dtype}, {sweep.reports[0].machine.gpu or 'CPU'}")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _draw_scope(axes: Axes, sweep: Sweep, scope: str) -> None:
    x = sweep.shares() if sweep.name == "mask_ratio" else sweep.values
    for backend in BACKENDS:
        if seconds := sweep.medians(scope, backend):
            axes.plot(x, seconds, marker="o", label=backend)
    if line := sweep.line(scope):
        ends = [min(x), max(x)]
        label = f"straight line through native (±{line.deviation:.0%})"
        axes.plot(ends, [line.intercept + line.slope * end for end in ends], "k--", linewidth=1, label=label)
    axes.set(title=f"{scope}, forward + backward", xlabel=_AXIS[sweep.name], ylabel="seconds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
