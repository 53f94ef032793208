"""A build's progress, read from ninja's `[3/13] …` lines: one line that is redrawn, or plain lines in a log."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
_SOURCE = re.compile(r"([\w.-]+\.(?:cpp|cu|cc))\b")
_BAR = 24


@dataclass(frozen=True)
class Step:
    """One finished step of a build: `done` of `total`, and the source file it compiled ("" if it names none)."""

    done: int
    total: int
    name: str


def parse_step(line: str) -> Step | None:
    """The step that a line of ninja's output reports, None if it reports none."""
    match = _STEP.match(line)
    if match is None:
        return None
    sources = _SOURCE.findall(line)
    return Step(int(match[1]), int(match[2]), sources[-1] if sources else "")


class Progress:
    """Draws a build's steps on `stream`: redrawn in place on a terminal, else one plain line a step.

    Args:
        label: what is being built.
        stream: where to draw.
        clock: seconds, for the elapsed time.
    """

    def __init__(self, label: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._label = label
        self._stream = stream
        self._clock = clock
        self._start = clock()
        self._terminal = stream.isatty()
        self._step = Step(0, 0, "")

    def read(self, line: str) -> None:
        """Take in one line of the build's output."""
        step = parse_step(line)
        if step is None:
            return
        self._step = step
        if not self._terminal:
            name = f"  {step.name}" if step.name else ""
            self._write(f"{self._label}: {step.done}/{step.total}  {self._elapsed()}{name}\n")

    def tick(self) -> None:
        """Redraw, so that the elapsed time moves while a long file compiles."""
        if not self._terminal:
            return
        done, total = self._step.done, self._step.total
        filled = _BAR * done // total if total else 0
        count = f"{done}/{total} files" if total else "preparing"
        self._write(f"\r{self._label} [{'#' * filled}{'.' * (_BAR - filled)}] {count}  {self._elapsed()}  \b\b")

    def close(self) -> None:
        """Leave the drawn line behind."""
        if self._terminal:
            self.tick()
            self._write("\n")

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(self._clock() - self._start), 60)
        return f"{minutes}:{seconds:02d}"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
