"""Calls in a process of their own: under limits of memory and time, or without root's rights."""

import os
import resource
import signal
import traceback
from collections.abc import Callable

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
