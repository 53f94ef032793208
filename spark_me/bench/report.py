"""Measurements as text for the screen, and as Markdown: docs/benchmarks.md is made of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spark_me.bench.results import Report, Row, ScopeResult
from spark_me.bench.sweep import LargestBatches, Sweep
from spark_me.bench.workloads import BACKENDS
from spark_me.errors import UserError
from spark_me.machine import Machine

MISSING = "n/a"


def format_report(report: Report) -> str:
    """Machine, case, and a table for each scope."""
    case = report.case
    height, width = case.image_size
    facts = [
        f"{case.encoder}, batch {case.batch}, {height}×{width} pixels, mask ratio {case.mask_ratio:g} "
        f"({report.visible_patches} of {report.patches} patches visible), {case.dtype}, on {case.device}",
        _counts(report),
    ]
    return "\n".join([*_head(report.machine), *facts, *(_scope_text(report, result) for result in report.scopes)])


def format_sweep(sweep: Sweep) -> str:
    """Machine, then medians of every backend at every value, and the straight line where one was fitted."""
    first = sweep.reports[0]
    case = first.case
    lines = [*_head(first.machine), f"{case.encoder}, {case.dtype}, on {case.device}; {_constants(sweep)}"]
    lines.append(_counts(first))
    for scope in (result.scope for result in first.scopes):
        columns = {backend: sweep.medians(scope, backend) for backend in BACKENDS}
        columns = {backend: seconds for backend, seconds in columns.items() if seconds}
        rows = [[sweep.name, "visible share", *(f"{backend} s" for backend in columns)]]
        for index, (value, share) in enumerate(zip(sweep.values, sweep.shares())):
            rows.append([f"{value:g}", f"{share:.3f}", *(f"{seconds[index]:.4f}" for seconds in columns.values())])
        lines += ["", f"{scope}, forward + backward, median seconds", *_align(rows)]
        lines += _line_text(sweep, scope)
    return "\n".join(lines)


def format_largest(result: LargestBatches) -> str:
    """Machine, then the largest batch of every backend."""
    case = result.case
    rows = [["backend", "runs as", "largest batch", "limit"]]
    for each in result.largest:
        rows.append([each.backend, mode(each.memory_format, False), str(each.batch), each.limit])
    height, width = case.image_size
    facts = (
        f"{case.encoder}, {result.scope}, {height}×{width} pixels, mask ratio {case.mask_ratio:g}, {case.dtype}, "
        f"on {case.device} with {result.gpu_bytes / 2**30:.1f} GiB; forward + backward, without an optimizer"
    )
    return "\n".join([*_head(result.machine), facts, "", *_align(rows, left=2)])


def _head(machine: Machine) -> list[str]:
    versions = " · ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [f"spark-me bench · {machine.date}", versions, f"{machine.processor} · {machine.threads} threads"]
    if machine.gpu is not None:
        allowed = [name for name, allowed in (machine.tf32 or {}).items() if allowed]
        lines.append(f"{machine.gpu} · TF32 for {' and '.join(allowed) or 'nothing'}")
    return lines


def _counts(report: Report) -> str:
    return f"{report.runs} interleaved runs after {report.warmup} for warm-up"


def _scope_text(report: Report, result: ScopeResult) -> str:
    header = ["backend", "runs as", "median s", "min–max s", "images/s"]
    header += ["× masked_dense", "× dense", "÷ floor", "activations MiB", "÷ masked_dense"]
    lines = ["", f"{result.scope}, forward + backward", *_align([header, *map(_cells, result.rows)], left=2)]
    if any(row.baseline for row in result.rows):
        lines.append("*: the fastest of its backend, which the others are compared with")
    lines += [f"{name}: {reason}" for name, reason in result.left_out.items()]
    if result.floor_seconds is not None:
        unreachable = "; no step reaches it, as its decoder is dense by the method" if result.scope == "step" else ""
        share = f"{report.visible_patches}/{report.patches}"
        lines.append(f"floor: {result.floor_seconds:.4f} s, the dense time × {share}{unreachable}")
    if result.tables is not None:
        share = f"{result.tables.share:.1%} of the encoder's time"
        lines.append(f"pyramid and neighbour tables of native: {result.tables.seconds:.4f} s, {share}")
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    mebibytes = None if row.activation_bytes is None else row.activation_bytes / 2**20
    return [
        row.backend,
        mode(row.memory_format, row.compiled) + " *" * row.baseline,
        f"{row.median:.4f}",
        f"{row.fastest:.4f}–{row.slowest:.4f}",
        f"{row.images_per_second:.2f}",
        _number(row.speed_to_masked_dense, 2),
        _number(row.speed_to_dense, 2),
        _number(row.ratio_to_floor, 2),
        _number(mebibytes, 0),
        _number(row.activation_ratio, 2),
    ]


def mode(memory_format: str | None, compiled: bool) -> str:
    """How a backend runs; a dash for the sparse ones, which know one mode only."""
    return "-" if memory_format is None else memory_format + ", compiled" * compiled


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _line_text(sweep: Sweep, scope: str) -> list[str]:
    line = sweep.line(scope)
    if line is None:
        return []
    text = f"native: {line.intercept:.4f} s + {line.slope:.4f} s × visible share, at most {line.deviation:.1%} off it"
    dense = sweep.medians(scope, "dense")
    if dense and 1.0 in sweep.shares():
        whole = sweep.shares().index(1.0)
        text += f"; with everything visible {sweep.medians(scope, 'native')[whole] / dense[whole]:.2f} × dense"
    return [text]


def _constants(sweep: Sweep) -> str:
    case = sweep.reports[0].case
    height, width = case.image_size
    constants = {"batch": f"batch {case.batch}", "image_size": f"{height}×{width} pixels"}
    constants["mask_ratio"] = f"mask ratio {case.mask_ratio:g}"
    return ", ".join(text for name, text in constants.items() if name != sweep.name)


def _align(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Columns of equal width: the first `left` flush left, the others, which are numbers, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


TIMES = [
    "encoder", "dtype", "batch", "backend", "runs as", "median ms", "min–max ms", "images/s",
    "speed against masked_dense", "activations GiB", "memory against masked_dense",
]  # fmt: skip
BATCHES = ["encoder", "scope", "dtype", "backend", "runs as", "largest batch", "against masked_dense", "limit"]


def markdown_of(files: Sequence[Path]) -> str:
    """Machines, then a table for each scope and one of the largest batches, cases in the order of the files.

    Each backend has one row, its fastest mode.

    Raises:
        UserError: if a file is no measurement of one case.
    """
    return _markdown([_read(file) for file in files])


def _markdown(contents: Sequence[dict[str, Any]]) -> str:
    timed = [content for content in contents if "scopes" in content]
    lines = list(dict.fromkeys(_machine(content) for content in contents))
    notes = []
    for scope in ("encoder", "step"):
        results = [(content, result) for content in timed for result in content["scopes"] if result["scope"] == scope]
        rows = [row for content, result in results for row in _time_rows(content["case"], result)]
        lines += _table(f"{scope}, forward and backward", TIMES, rows)
        notes += [
            f"- {content['case']['encoder']}, {content['case']['dtype']}, {scope}, {name}: {reason}"
            for content, result in results
            for name, reason in result["left_out"].items()
        ]
    rows = [row for content in contents if "largest" in content for row in _batch_rows(content)]
    lines += _table("largest batch that fits", BATCHES, rows)
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable ({error}): give files that `spark-me bench --json` wrote") from None
    if not isinstance(content, dict) or not {"machine", "case"} <= set(content):
        raise UserError(f"{file}: not of one case: give files that `spark-me bench --json` wrote without --sweep")
    try:
        _markdown([content])
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file}: is no measurement ({reason}): measure again by `spark-me bench --json`") from None
    return content


def _machine(content: dict[str, Any]) -> str:
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['date'][:10]}, {machine['gpu'] or machine['processor']}; {versions}"


def _time_rows(case: dict[str, Any], result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for backend in dict.fromkeys(row["backend"] for row in result["rows"]):
        row = min((row for row in result["rows"] if row["backend"] == backend), key=lambda row: row["median"])
        memory = row["activation_bytes"]
        rows.append(
            [
                case["encoder"],
                case["dtype"],
                str(case["batch"]),
                f"`{backend}`",
                mode(row["memory_format"], row["compiled"]),
                f"{1e3 * row['median']:.1f}",
                f"{1e3 * row['fastest']:.1f}–{1e3 * row['slowest']:.1f}",
                f"{row['images_per_second']:.0f}",
                _ratio(row["speed_to_masked_dense"]),
                MISSING if memory is None else f"{memory / 2**30:.2f}",
                _ratio(row["activation_ratio"]),
            ]
        )
    return rows


def _batch_rows(content: dict[str, Any]) -> list[list[str]]:
    case, largest = content["case"], content["largest"]
    simulated = next((each["batch"] for each in largest if each["backend"] == "masked_dense"), 0)
    return [
        [
            case["encoder"],
            content["scope"],
            case["dtype"],
            f"`{each['backend']}`",
            mode(each["memory_format"], False),
            str(each["batch"]),
            _ratio(each["batch"] / simulated if simulated else None),
            f"{each['limit']}, {content['gpu_bytes'] / 2**30:.0f} GiB" if each["limit"] == "memory" else each["limit"],
        ]
        for each in largest
    ]


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}×"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    cells = [header, ["---"] * len(header), *rows]
    return ["", f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in cells)]
