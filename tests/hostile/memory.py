"""A bound on what a test may take."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def memory_below(megabytes: int) -> Iterator[None]:
    """Fail if this process's peak grows by more than so many."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < megabytes, f"took {grown:.0f} MB"
