"""Measurements as text for the screen, and as Markdown: docs/benchmarks.md is made of it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from spark_me.bench.sweep import medians_of, shares_of
from spark_me.bench.timing import Record, fastest_rows
from spark_me.bench.workloads import WORK, Variant
from spark_me.errors import UserError
from spark_me.tables import markdown_table, text_table

MISSING = "n/a"


def format_record(record: Record) -> str:
    """Machine, case, and the tables of a measurement, a sweep or a search for the largest batch."""
    first = record["reports"][0] if "reports" in record else record
    machine, case = first["machine"], first["case"]
    lines = [
        f"spark-me bench · {machine['date']}",
        " · ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"{machine['processor']} · {machine['threads']} threads",
    ]
    if machine["gpu"] is not None:
        allowed = [name for name, allowed in (machine["tf32"] or {}).items() if allowed]
        lines.append(f"{machine['gpu']} · TF32 for {' and '.join(allowed) or 'nothing'}")
    height, width = case["image_size"]
    if "workers" in case:
        return "\n".join([*lines, *_loading_lines(record)])
    facts = {
        "encoder": case["encoder"],
        "batch": f"batch {case['batch']}",
        "image_size": f"{height}×{width} pixels",
        "mask_ratio": f"mask ratio {case['mask_ratio']:g}",
        "dtype": case["dtype"],
        "device": f"on {case['device']}",
    }
    varied = "batch" if "largest" in record else record.get("name")
    lines.append(", ".join(text for name, text in facts.items() if name != varied))
    if "largest" in record:
        lines += [
            "",
            f"{_named(record['scope'], record['scope'], case)}, largest batch in "
            f"{record['gpu_bytes'] / 2**30:.1f} GiB, without an optimizer",
        ]
        return "\n".join([*lines, *_columns(_batch_cells(record))])
    lines.append(f"{first['runs']} interleaved runs after {first['warmup']} for warm-up")
    if "reports" in record:
        return "\n".join([*lines, *_sweep_lines(record)])
    lines.append(f"{record['visible_patches']} of {record['patches']} patches visible")
    return "\n".join([*lines, *(line for result in record["scopes"] for line in _scope_lines(case, result))])


def _named(text: str, scope: str, case: Record) -> str:
    """With the decoder, where it is measured and no UNet."""
    decoder = case.get("decoder", "unet")  # older files do not say
    return text if scope == "encoder" or decoder == "unet" else f"{text} with {decoder} decoder"


def _scope_lines(case: Record, result: Record) -> list[str]:
    rows = [
        {
            "backend": row["backend"],
            "runs as": _mode(row) + " *" * row["baseline"],
            "median s": f"{row['median']:.4f}",
            "min–max s": f"{row['fastest']:.4f}–{row['slowest']:.4f}",
            "images/s": f"{row['images_per_second']:.2f}",
            "× masked_dense": _number(row["speed_to_masked_dense"]),
            "× dense": _number(row["speed_to_dense"]),
            "÷ floor": _number(row["ratio_to_floor"]),
            "activations MiB": _number(row["activation_bytes"], ".0f", 2**20),
            "÷ masked_dense": _number(row["activation_ratio"]),
        }
        for row in result["rows"]
    ]
    lines = ["", f"{_named(result['scope'], result['scope'], case)}, {WORK[result['scope']]}", *_columns(rows)]
    if any(row["baseline"] for row in result["rows"]):
        lines.append("*: the fastest of its backend, which the others are compared with")
    lines += [f"{name}: {reason}" for name, reason in result["left_out"].items()]
    if floor := result["floor_seconds"]:
        unreachable = "; no step reaches it, as its decoder is dense by the method" * (result["scope"] != "encoder")
        lines.append(f"floor: {floor:.4f} s, the dense time × the visible share{unreachable}")
    if tables := result["tables"]:
        seconds, share = tables["seconds"], tables["share"]
        lines.append(f"pyramid and neighbour tables of native: {seconds:.4f} s, {share:.1%} of the encoder's time")
    return lines


def _loading_lines(record: Record) -> list[str]:
    case, (result,) = record["case"], record["scopes"]
    (height, width), photo = case["image_size"], "×".join(map(str, case["photo_size"]))
    return [
        f"{case['images']} images {'made, ' + photo + ' pixels' if case['root'] is None else 'of ' + case['root']}, "
        f"crops of {height}×{width} pixels, batch {case['batch']}",
        f"{record['runs']} interleaved runs after {record['warmup']} for warm-up",
        "",
        "data, the loader of pretraining",
        *_columns([_loading_cells(row) for row in result["rows"]]),
    ]


def _loading_cells(row: Record) -> dict[str, str]:
    return {
        "workers": str(row["workers"]),
        "decoding": row["decoding"],
        "median s": f"{row['median']:.4f}",
        "min–max s": f"{row['fastest']:.4f}–{row['slowest']:.4f}",
        "images/s": f"{row['images_per_second']:.1f}",
        "× whole": f"{row['speed_to_whole']:.2f}",
    }


def _sweep_lines(record: Record) -> list[str]:
    lines = []
    shares = shares_of(record["reports"])
    for scope, columns in medians_of(record["reports"]).items():
        rows = [
            {record["name"]: f"{value:g}", "visible share": f"{share:.3f}"}
            | {f"{backend} s": _number(seconds[place], ".4f") for backend, seconds in columns.items()}
            for place, (value, share) in enumerate(zip(record["values"], shares))
        ]
        title = _named(scope, scope, record["reports"][0]["case"])
        lines += ["", f"{title}, {WORK[scope]}, median seconds", *_columns(rows)]
        if line := record["native_lines"][scope]:
            text = f"native: {line['intercept']:.4f} s + {line['slope']:.4f} s × visible share"
            text += f", at most {line['deviation']:.1%} off it"
            if "dense" in columns and 1.0 in shares:
                native, dense = (columns[backend][shares.index(1.0)] for backend in ("native", "dense"))
                text += f"; with everything visible {_number(native / dense)} × dense"
            lines.append(text)
    return lines


def _columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A table for the screen: words flush left, numbers flush right."""
    sides = "".join("<" if name in WORDS else ">" for name in rows[0])
    header, *lines = text_table([[*rows[0]], *([*row.values()] for row in rows)], sides).split("\n")
    return [header, "-" * max(map(len, (header, *lines))), *lines]


WORDS = ("encoder", "scope", "dtype", "backend", "runs as", "limit", "images", "decoding")


def markdown_of(files: Sequence[Path]) -> str:
    """Machines, then a table for each scope and one of the largest batches, cases in the order of the files.

    Each backend has one row, its fastest mode.

    Raises:
        UserError: if a file is no measurement of one case.
    """
    return _markdown([_read(file) for file in files])


def _read(file: Path) -> Record:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        _markdown([record])
    except (OSError, RecursionError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"{file}: not readable as a measurement of one case ({type(error).__name__}: {error}): "
            "give files that `spark-me bench --json` wrote without --sweep"
        ) from None
    return record


def _markdown(records: Sequence[Record]) -> str:
    lines = list(dict.fromkeys(_machine(record["machine"]) for record in records))
    notes = [""]
    for scope, what in WORK.items():
        rows = []
        for case, result in [(each["case"], result) for each in records for result in each.get("scopes", ())]:
            if result["scope"] == scope:
                rows += [_time_cells(case, scope, row) for row in fastest_rows(result).values()]
                where = f"{case['encoder']}, {case['dtype']}, {scope}"
                notes += [f"- {where}, {name}: {reason}" for name, reason in result["left_out"].items()]
        lines += _markdown_table(f"{scope}, {what.replace('+', 'and')}", rows)
    rows = [
        _loading_facts(record["case"]) | _loading_cells(row)
        for record in records
        for result in record.get("scopes", ())
        if result["scope"] == "data"
        for row in result["rows"]
    ]
    lines += _markdown_table("data, the loader of pretraining", rows)
    rows = [row for record in records for row in _batch_cells(record)]
    lines += _markdown_table("largest batch that fits", rows)
    return "\n".join([*lines, *(notes if len(notes) > 1 else [])])


def _machine(machine: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['date'][:10]}, {machine['gpu'] or machine['processor']}; {versions}"


def _time_cells(case: Record, scope: str, row: Record) -> dict[str, str]:
    return {
        "encoder": _named(case["encoder"], scope, case),
        "dtype": case["dtype"],
        "batch": str(case["batch"]),
        "backend": row["backend"],
        "runs as": _mode(row),
        "median ms": f"{1e3 * row['median']:.1f}",
        "min–max ms": f"{1e3 * row['fastest']:.1f}–{1e3 * row['slowest']:.1f}",
        "images/s": f"{row['images_per_second']:.0f}",
        "speed against masked_dense": _ratio(row["speed_to_masked_dense"]),
        "activations GiB": _number(row["activation_bytes"], unit=2**30),
        "memory against masked_dense": _ratio(row["activation_ratio"]),
    }


def _batch_cells(record: Record) -> list[dict[str, str]]:
    case, largest = record["case"], record.get("largest", ())
    simulated = next((each["batch"] for each in largest if each["backend"] == "masked_dense"), 0)
    return [
        {
            "encoder": _named(case["encoder"], record["scope"], case),
            "scope": record["scope"],
            "dtype": case["dtype"],
            "backend": each["backend"],
            "runs as": _mode(each),
            "largest batch": str(each["batch"]),
            "against masked_dense": _ratio(each["batch"] / simulated if simulated else None),
            "limit": each["limit"] + f", {record['gpu_bytes'] / 2**30:.0f} GiB" * (each["limit"] == "memory"),
        }
        for each in largest
    ]


def _markdown_table(title: str, rows: Sequence[Mapping[str, str]]) -> list[str]:
    if not rows:
        return []
    cells = [[f"`{text}`" if name == "backend" else text for name, text in row.items()] for row in rows]
    return ["", f"**{title}**", "", markdown_table([[*rows[0]], *cells], "<" * len(rows[0]))]


def _loading_facts(case: Record) -> dict[str, str]:
    sides = ("photo_size", "image_size")
    photo, crop = ("×".join(map(str, case[key])) for key in sides)
    return {"images": case["root"] or photo, "crop": crop, "batch": str(case["batch"])}


def _mode(row: Record) -> str:
    return Variant(row["backend"], row["memory_format"], row.get("compiled", False)).mode


def _number(value: float | None, style: str = ".2f", unit: float = 1) -> str:
    return MISSING if value is None or math.isnan(value) else f"{value / unit:{style}}"


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}×"
