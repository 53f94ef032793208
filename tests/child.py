"""Calls in a process of their own: to be killed, under limits of memory and time, or without root's rights.

The processes are forks of this one: a new Python would import for ten seconds what is here already.
"""

import os
import resource
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable

import torch

MIB = 1 << 20
NOBODY = 65534


def run_limited(function: Callable[[], object], *, memory: int = 1 << 30, seconds: int = 60, root: bool = True) -> str:
    """What a call returns, as text.

    Args:
        function: runs in a fork of this process.
        memory: bytes that it may take at most at any time, besides what this process has.
        seconds: how long it may run.
        root: whether it keeps the rights of this process; else it is nobody's, who may read only what all may.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads are not in a fork
            signal.alarm(seconds)
            # A failing test must not take the machine with it.
            resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))
            if not root and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            text = str(function())
            taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            text = "0" + text if taken < memory else f"1took {taken / MIB:.0f} MiB: {text}"
        except BaseException:
            text = "1" + traceback.format_exc()
        os.write(writer, text[:60_000].encode(errors="replace"))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(child, 0)
    assert text.startswith("0"), text[1:] or f"died, or took more than {seconds} s"
    return text[1:]


class Child:
    """A call in a fork of this process, whose code is what it returns, or where it leaves by SystemExit.

    What it writes, to both streams, is kept; a traceback too, with code 1.
    """

    def __init__(self, function: Callable[[], int | None]) -> None:
        self.returncode: int | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the child)
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run(function))

    def _run(self, function: Callable[[], int | None]) -> int:
        for stream in (1, 2):
            os.dup2(self._output.fileno(), stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
        torch.set_num_threads(1)  # OpenMP's threads are not in a fork
        try:
            return function() or 0
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def poll(self) -> int | None:
        """The code, -signal of one that was killed; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its code, when it has ended."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    @property
    def output(self) -> str:
        """What it has written so far."""
        return os.pread(self._output.fileno(), 1 << 20, 0).decode()


def together(function: Callable[[], int | None], processes: int = 2) -> list[Child]:
    """The same call in several processes that have what torchrun would tell them; waits for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def member(rank: int) -> Callable[[], int | None]:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), **address}
        return lambda: os.environ.update(own) or function()  # type: ignore[func-returns-value]

    children = [Child(member(rank)) for rank in range(processes)]
    for child in children:
        child.wait()
    return children
