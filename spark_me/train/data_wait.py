"""How long training waits for its images, and a word about it when that is long."""

import time
from collections.abc import Callable

MOST = 0.2
"""Share of the time that may go by waiting before it is said."""
STEPS = 10
"""Steps that are measured before."""


class DataWait:
    """The share of waiting in the time since the epoch began; says once an epoch that it is large."""

    def __init__(self, workers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            workers: `data.workers`, for the message.
            clock: seconds that pass.
        """
        self.workers = workers
        self._clock = clock
        self._said = False
        self._start: float | None = None

    def add(self, seconds: float) -> str | None:
        """Note that a step, now over, waited so many seconds; return what there is to say."""
        if self._start is None:  # the first step also starts the workers
            self._start, self._waited, self._steps = self._clock(), 0.0, 0
            return None
        self._waited += seconds
        self._steps += 1
        share = self._waited / max(self._clock() - self._start, 1e-9)
        if self._said or self._steps < STEPS or share <= MOST:
            return None
        self._said = True
        return (
            f"the loader is the bottleneck: {share:.0%} of the time is spent waiting for images; "
            f"raise data.workers (now {self.workers}) or shrink the images"
        )

    def begin_epoch(self) -> None:
        """Forget what was: between epochs there is more than training."""
        self._said = False
        self._start = None
