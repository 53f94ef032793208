"""Being asked to stop: by SIGTERM, as clusters do before they take a machine away, or by Ctrl-C."""

import os
import signal
import sys
import threading
from types import FrameType

from tqdm import tqdm

ANSWERS = {
    signal.SIGINT: "spark-me: finishing this step, then saving; Ctrl-C again stops at once, without saving",
    signal.SIGTERM: "spark-me: asked to stop (SIGTERM): finishing this step, then saving",
}


class StopRequest:
    """Within its block, SIGTERM and SIGINT are answered and noted instead of obeyed; a SIGINT after that stops at once.

    Python calls a signal's handler between two of its own instructions, and a backward pass may be a single one that
    takes seconds. So a thread answers: the interpreter writes the signal's number into a pipe as soon as it comes.
    """

    def __init__(self, *, answer: bool = True) -> None:
        """
        Args:
            answer: say that the signal was noticed; of several processes one should.
        """
        self.signal: signal.Signals | None = None
        """The first one that came."""
        self._answer = answer

    def __enter__(self) -> "StopRequest":
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        self._previous_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._note) for number in ANSWERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        os.close(self._writer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)

    def _listen(self, reader: int) -> None:
        """Answer the first signal; end when the pipe is closed."""
        answered = not self._answer
        while number := os.read(reader, 1):
            text = ANSWERS.get(signal.Signals(number[0]))
            if text is not None and not answered:
                answered = True
                tqdm.write(text, file=sys.stderr)
        os.close(reader)
