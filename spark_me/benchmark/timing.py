"""Wall-clock time of several workloads, interleaved, so that whatever disturbs the machine disturbs all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

Key = TypeVar("Key")
Clock = Callable[[], float]
Advance = Callable[[str], None]
"""Told what comes next, for a progress bar."""


class Timed(Protocol):
    """What can be timed."""

    def run(self) -> None:
        """The work; finished when it returns."""

    def clear(self) -> None:
        """What is done between two runs and not timed."""


def time_interleaved(
    workloads: Mapping[Key, Timed],
    *,
    runs: int,
    warmup: int,
    advance: Advance = lambda label: None,
    clock: Clock = time.perf_counter,
) -> dict[Key, list[float]]:
    """Run every workload once a round.

    Args:
        workloads: what to run, in this order in every round.
        runs: rounds that count.
        warmup: rounds before them that do not.
        advance: told the name of each workload before it runs.
        clock: seconds.

    Returns:
        `runs` times in seconds for each workload.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in workloads}
    for turn in range(warmup + runs):
        for key, workload in workloads.items():
            advance(f"{'warm-up' if turn < warmup else 'timing'} {key}")
            workload.clear()
            gc.collect()  # or the collector would run in the middle of someone's pass
            start = clock()
            workload.run()
            elapsed = clock() - start
            if turn >= warmup:
                seconds[key].append(elapsed)
        workload.clear()
    return seconds


def time_median(work: Callable[[], None], *, runs: int, warmup: int, clock: Clock = time.perf_counter) -> float:
    """Median seconds of one piece of work."""
    seconds = []
    for turn in range(warmup + runs):
        start = clock()
        work()
        elapsed = clock() - start
        if turn >= warmup:
            seconds.append(elapsed)
    return statistics.median(seconds)
