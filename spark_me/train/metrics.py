"""metrics.jsonl: one JSON object a line, each with the number of steps done."""

import json
from pathlib import Path
from typing import Any

from spark_me.files import write_text, writing


class MetricsFile:
    """Appends to a metrics file; lines of steps that a resumed run will do again are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [entry for entry in read_metrics(path) if entry["step"] <= first_step]
        write_text(path, "".join(_line(entry) for entry in kept))
        self.path = path

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on its way to the disk when this returns."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; none if there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A killed run may leave half a line at the end.
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
