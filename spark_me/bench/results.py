"""What was measured, and how the backends compare."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from spark_me.bench.case import Case
from spark_me.bench.workloads import Variant
from spark_me.machine import Machine


@dataclass(frozen=True)
class Row:
    """One backend, run in one mode. A figure that needs a backend which did not run is None."""

    backend: str
    memory_format: str | None
    compiled: bool
    baseline: bool
    """The fastest mode of a dense backend: the one that the others are compared with."""
    seconds: list[float]
    median: float
    fastest: float
    slowest: float
    images_per_second: float
    speed_to_masked_dense: float | None
    """How many times faster than the simulation."""
    speed_to_dense: float | None
    """How many times faster than the dense network without a mask."""
    ratio_to_floor: float | None
    """Median over dense time × visible share: 1 would be all of the sparsity paid out."""
    activation_bytes: int | None
    """Peak memory of a pass above weights and gradients; None where it was not measured."""
    activation_ratio: float | None
    """That memory over the simulation's."""


@dataclass(frozen=True)
class Tables:
    """The `native` backend's pyramid and neighbour tables of one batch."""

    seconds: float
    share: float
    """Of the encoder's time."""


@dataclass(frozen=True)
class ScopeResult:
    """All backends in one scope."""

    scope: str
    rows: list[Row]
    floor_seconds: float | None
    """Dense time × visible share."""
    tables: Tables | None
    left_out: dict[str, str]
    """What did not run, and why."""

    def fastest_row(self, backend: str) -> Row | None:
        """The backend's row, in its fastest mode; None if it did not run."""
        return min((row for row in self.rows if row.backend == backend), key=lambda row: row.median, default=None)


@dataclass(frozen=True)
class Report:
    """One case on one machine."""

    machine: Machine
    case: Case
    visible_patches: int
    patches: int
    runs: int
    warmup: int
    scopes: list[ScopeResult]


def compare(
    scope: str,
    seconds: Mapping[Variant, list[float]],
    memory: Mapping[Variant, int | None],
    *,
    batch: int,
    visible_share: float,
    table_seconds: float | None = None,
    left_out: Mapping[str, str] | None = None,
) -> ScopeResult:
    """Medians and ratios from the times of all runs.

    Args:
        scope: "encoder" or "step".
        seconds: the times of each variant.
        memory: bytes of activations of the variants that were measured.
        batch: B.
        visible_share: of the patches.
        table_seconds: time of the pyramid and the tables; needs the native backend among the variants.
        left_out: what did not run, and why.
    """
    median = {variant: statistics.median(times) for variant, times in seconds.items()}
    masked, dense = (_fastest(median, backend) for backend in ("masked_dense", "dense"))
    floor = median[dense] * visible_share if dense else None
    rows = [
        Row(
            backend=variant.backend,
            memory_format=variant.memory_format,
            compiled=variant.compiled,
            baseline=variant in (masked, dense),
            seconds=times,
            median=median[variant],
            fastest=min(times),
            slowest=max(times),
            images_per_second=batch / median[variant],
            speed_to_masked_dense=median[masked] / median[variant] if masked else None,
            speed_to_dense=median[dense] / median[variant] if dense else None,
            ratio_to_floor=median[variant] / floor if floor else None,
            activation_bytes=memory.get(variant),
            activation_ratio=_ratio(memory.get(variant), memory.get(masked) if masked else None),
        )
        for variant, times in seconds.items()
    ]
    tables = None
    if table_seconds is not None:
        tables = Tables(table_seconds, table_seconds / median[Variant("native", None)])
    return ScopeResult(scope, rows, floor, tables, dict(left_out or {}))


def _fastest(median: Mapping[Variant, float], backend: str) -> Variant | None:
    return min((variant for variant in median if variant.backend == backend), key=lambda v: median[v], default=None)


def _ratio(value: int | None, reference: int | None) -> float | None:
    return value / reference if value is not None and reference else None
