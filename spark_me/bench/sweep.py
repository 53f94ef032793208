"""How cost grows with one property of the case, and the largest batch that fits into a GPU."""

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from matplotlib.figure import Figure

from spark_me.bench.timing import (
    Advance,
    Record,
    case_on_machine,
    fastest_rows,
    is_out_of_memory,
    kind_and_line,
    measure,
    release_memory,
)
from spark_me.bench.workloads import WORK, Case, Variant, Workload
from spark_me.errors import EngineError, UserError

SWEEPS: dict[str, tuple[float, ...]] = {
    # visible shares from 0.1 to 1.0
    "mask_ratio": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
    "batch": (1, 2, 4, 8, 16),
    "image_size": (128, 192, 256, 320, 384),
}
"""What can be swept, and through which values by default."""
_AXIS = {"mask_ratio": "visible share of the patches", "batch": "images in a batch", "image_size": "image side, pixels"}


def cases_of(case: Case, name: str, values: Sequence[float] | None) -> list[Case]:
    """The case at each value (None: of `SWEEPS`) of a property; an image size is the side of a square.

    Raises:
        UserError: for a value that is no whole number where one is needed.
    """
    cases = []
    for value in values or SWEEPS[name]:
        if name != "mask_ratio" and not float(value).is_integer():
            raise UserError(f"--values {value:g}: a sweep over {name} takes whole numbers")
        typed: Any = {"mask_ratio": value, "batch": int(value), "image_size": (int(value), int(value))}[name]
        cases.append(dataclasses.replace(case, **{name: typed}))
    return cases


def measure_each(name: str, cases: Sequence[Case], *args: Any, **options: Any) -> Iterator[Record]:
    """Measure each case of `cases_of` with the other arguments of `measure`; yield the sweep so far after each."""
    reports: list[Record] = []
    for case in cases:
        reports.append(measure(case, *args, **options))
        yield sweep_of(name, list(reports))


def sweep_of(name: str, reports: list[Record]) -> Record:
    """All figures, and lines through `native` over the visible share if that varies and has three values at least."""
    shares, lines = shares_of(reports), {}
    for scope, seconds in medians_of(reports).items():
        native = seconds.get("native", [math.nan])
        fitted = name == "mask_ratio" and len(set(shares)) >= 3 and not any(map(math.isnan, native))
        lines[scope] = fit_line(shares, native) if fitted else None
    values = [report["case"][name] for report in reports]
    values = [value[0] for value in values] if name == "image_size" else values
    return {"name": name, "values": values, "reports": reports, "native_lines": lines}


def shares_of(reports: Sequence[Record]) -> list[float]:
    """Visible share of each report."""
    return [report["visible_patches"] / report["patches"] for report in reports]


def medians_of(reports: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """By scope and backend: seconds in each report, in the fastest mode; NaN where the backend did not run."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for place, report in enumerate(reports):
        for result in report["scopes"]:
            for backend, row in fastest_rows(result).items():
                of_scope = seconds.setdefault(result["scope"], {})
                of_scope.setdefault(backend, [math.nan] * len(reports))[place] = row["median"]
    return seconds


def fit_line(x: Sequence[float], y: Sequence[float]) -> Record:
    """The line of least squared relative distances, and how far the points stray from it, as a share of it.

    Distances count relative to the points, as they are reported: times span a factor of ten, and in plain least squares
    the largest would decide.
    """
    slope, intercept = np.polyfit(x, y, 1, w=1 / np.asarray(y))
    line = intercept + slope * np.asarray(x)
    deviation = np.max(np.abs(y - line) / line)
    return {"intercept": float(intercept), "slope": float(slope), "deviation": float(deviation)}


def draw_sweep(record: Record, file: BinaryIO) -> None:
    """A PNG with one panel a scope and one curve a backend: seconds of a pass over what was swept."""
    reports, medians = record["reports"], medians_of(record["reports"])
    x = shares_of(reports) if record["name"] == "mask_ratio" else record["values"]
    figure = Figure(figsize=(6.4 * len(medians), 4.8), layout="constrained")
    for axes, (scope, columns) in zip(figure.subplots(1, len(medians), squeeze=False)[0], medians.items()):
        for backend, seconds in columns.items():
            axes.plot(x, seconds, marker="o", label=backend)
        if line := record["native_lines"][scope]:
            ends = [min(x), max(x)]
            label = f"straight line through native (±{line['deviation']:.0%})"
            axes.plot(ends, [line["intercept"] + line["slope"] * end for end in ends], "k--", linewidth=1, label=label)
        axes.set(title=f"{scope}, {WORK[scope]}", xlabel=_AXIS[record["name"]], ylabel="seconds")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    case, machine = reports[0]["case"], reports[0]["machine"]
    figure.suptitle(f"{case['encoder']}, {case['dtype']}, {machine['gpu'] or 'CPU'}")
    figure.savefig(file, format="png", dpi=150)


STEP = 8
"""Batches are tried in multiples of this."""


def find_largest_batches(case: Case, scope: str, variants: Sequence[Variant], advance: Advance) -> Record:
    """Search for the largest batch of each backend that fits into the GPU, beginning at the case's.

    Weights and their gradients are in memory too, an optimizer is not. Dense backends run in channels_last, none is
    compiled: a compiler would start anew with every batch.

    Raises:
        UserError: on a CPU.
    """
    if case.device != "cuda":
        raise UserError("--largest-batch asks how much fits into a GPU: add --device cuda")
    searched = [each for each in variants if each.memory_format != "contiguous" and not each.compiled]
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    largest = [_largest_of(case, scope, variant, advance) for variant in searched]
    return {**case_on_machine(case), "scope": scope, "gpu_bytes": gpu_bytes, "largest": largest}


def search(fits: Callable[[int], bool], first: int = STEP) -> int:
    """The largest multiple of `STEP` that fits, 0 if none does: doubled from `first` until it does not, then bisected.

    Where one does not fit, no larger one does.
    """
    below, above = 0, max(1, first // STEP)  # in multiples of STEP
    while fits(above * STEP):
        below, above = above, 2 * above
    return STEP * bisect_left(range(1, above), True, lo=below, key=lambda count: not fits(count * STEP))


def _largest_of(case: Case, scope: str, variant: Variant, advance: Advance) -> Record:
    workload = Workload(dataclasses.replace(case, batch=2), scope, variant)
    limit = "memory"

    def fits(batch: int) -> bool:
        nonlocal limit  # what stopped the next larger one
        advance(f"{variant}, batch {batch}")
        try:
            workload.run(workload.inputs(dataclasses.replace(case, batch=batch)))
        except (RuntimeError, EngineError) as error:
            limit = "memory" if is_out_of_memory(error) else kind_and_line(error)
            return False
        finally:
            workload.clear()
            release_memory()
        return True

    batch = search(fits, case.batch)  # 0 if not even the smallest fits
    return {"backend": variant.backend, "memory_format": variant.memory_format, "batch": batch, "limit": limit}
