"""Being asked to stop: by SIGTERM, as clusters do before they take a machine away, or by Ctrl-C."""

import signal
from types import FrameType


class StopRequest:
    """Within its block, SIGTERM and SIGINT are noted instead of obeyed; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first one that came."""

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)
