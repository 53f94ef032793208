"""Pseudo-terminals: what a person sees whose terminal has so many columns."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pyte

HISTORY = 1000
"""Lines of the emulated screen: all that scrolls off a real one."""


class Recording(NamedTuple):
    """What was written to a terminal."""

    code: int
    """Exit code."""
    raw: str
    """Everything, with what was drawn over later."""
    screen: list[str]
    """The lines that stand there in the end."""

    def assert_tidy(self, columns: int) -> None:
        """No bar is wider than the terminal, or it would be left behind in pieces; no traceback."""
        assert "Traceback" not in self.raw, self.raw
        for frame in self.raw.replace("\n", "\r").split("\r"):
            if "|" in frame:  # only bars are redrawn
                assert len(frame) <= columns, frame


def record(function: Callable[[], int], columns: int) -> Recording:
    """Call a function whose standard output and error are a terminal."""
    with _terminal(columns) as (device, content):
        with (
            os.fdopen(os.dup(device), "w", encoding="utf-8") as stream,
            redirect_stdout(stream),
            redirect_stderr(stream),
        ):
            code = function()
        os.close(device)
        raw = content()
    return Recording(code, raw, _screen(raw, columns))


def record_command(
    command: Sequence[str], columns: int, *, folder: Path, variables: dict[str, str] | None = None
) -> Recording:
    """Run a program in a terminal of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with _terminal(columns) as (device, content):
        process = subprocess.Popen(
            command,
            stdin=device,
            stdout=device,
            stderr=device,
            cwd=folder,
            env={**environment, "TERM": "xterm", **(variables or {})},
            start_new_session=True,
        )
        os.close(device)
        raw = content()
    return Recording(process.wait(), raw, _screen(raw, columns))


@contextmanager
def _terminal(columns: int) -> Iterator[tuple[int, Callable[[], str]]]:
    """The terminal's own file descriptor, and what waits for its end and returns what came."""
    master, device = pty.openpty()
    fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    chunks: list[bytes] = []
    reader = threading.Thread(target=_drain, args=(master, chunks))
    reader.start()

    def content() -> str:
        reader.join()
        return b"".join(chunks).decode("utf-8")

    yield device, content
    reader.join()
    os.close(master)


def _drain(master: int, chunks: list[bytes]) -> None:
    while True:
        try:
            chunk = os.read(master, 1 << 16)
        except OSError:  # how Linux says that nobody has the terminal open any more
            return
        if not chunk:
            return
        chunks.append(chunk)


def _screen(raw: str, columns: int) -> list[str]:
    screen = pyte.Screen(columns, HISTORY)
    pyte.Stream(screen).feed(raw)
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines


if __name__ == "__main__":  # python tests/terminal.py COLUMNS COMMAND…: look at a recording
    shown = record_command(sys.argv[2:], int(sys.argv[1]), folder=Path.cwd())
    print("\n".join(shown.screen))
    raise SystemExit(shown.code)
