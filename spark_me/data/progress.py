"""What slow work before a run is doing, and what it found, in lines on stderr."""

import os
import sys
import time

SECONDS = 2.0
"""Work that takes longer says what it is doing, again each time it has taken twice as long."""


class Progress:
    """Work that has just begun."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._say_after = SECONDS

    def note(self, what: str) -> None:
        """Say where the work is, if it is time to."""
        seconds = time.monotonic() - self._start
        if seconds > self._say_after:
            self._say_after *= 2
            say(f"{what} ({seconds:.0f} s so far)")


def say(line: str) -> None:
    """Print a line on stderr, of the processes of a job on the first alone: all of them look at the same images."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def files_text(number: int) -> str:
    """A number of files for people."""
    return f"{number:,} file" if number == 1 else f"{number:,} files"
