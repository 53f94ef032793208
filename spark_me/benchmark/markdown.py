"""Measurements as Markdown, from the files of `spark-me bench --json`: docs/benchmarks.md is made of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spark_me.benchmark.report import MISSING, manner
from spark_me.errors import UserError

TIMES = [
    "encoder", "dtype", "batch", "backend", "runs as", "median ms", "min–max ms", "images/s",
    "speed against masked_dense", "activations GiB", "memory against masked_dense",
]  # fmt: skip
BATCHES = ["encoder", "scope", "dtype", "backend", "runs as", "largest batch", "against masked_dense", "limit"]


def markdown_of(files: Sequence[Path]) -> str:
    """Machines, then a table for each scope and one of the largest batches, cases in the order of the files.

    Each backend has one row, its fastest manner.

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
                manner(row["memory_format"], row["compiled"]),
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
            manner(each["memory_format"], False),
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
