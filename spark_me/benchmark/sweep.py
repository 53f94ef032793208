"""How cost grows with one property of the case."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spark_me.benchmark.case import Case
from spark_me.benchmark.measure import measure
from spark_me.benchmark.results import Report
from spark_me.errors import UserError

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
        """Seconds of a backend in each report, in its fastest manner; empty if it did not run."""
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
