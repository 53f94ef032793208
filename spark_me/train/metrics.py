"""metrics.jsonl: one JSON object a line, each with the number of steps done."""

import json
from pathlib import Path
from typing import Any

from spark_me.files import write_text, writing


class MetricsFile:
    """Appends to a metrics file; lines of steps that a resumed run will do again are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        entries, damaged = _read(path)
        if damaged:
            print(f"spark-me: {path}: left out {damaged} lines that are damaged")
        kept = [entry for entry in entries if entry["step"] <= first_step]
        write_text(path, "".join(_line(entry) for entry in kept))
        self.path = path

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on its way to the disk when this returns."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All good lines of a metrics file; none if there is no file. Values that are null or no numbers are left out."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The good lines, and how many others there are. A run's curve is worth less than the run, which goes on."""
    if not path.is_file():
        return [], 0
    entries = [_entry(line) for line in path.read_bytes().split(b"\n") if line]
    good = [entry for entry in entries if entry is not None]
    return good, len(entries) - len(good)


def _entry(line: bytes) -> dict[str, Any] | None:
    """A kill or a power cut may leave half a line, or one of zeros."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return None
    return {name: value for name, value in entry.items() if type(value) in (int, float)}


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
