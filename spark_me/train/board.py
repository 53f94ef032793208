"""TensorBoard's event file. A run is worth more than its curves: when the file cannot be written, the run goes on."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard import summary

from spark_me.errors import printable

VERSION = "brain.Event:2"
"""Of the file's format, which its first record says."""


class Board:
    """Scalars and pictures by step, each written at once: torch's writer has a thread, whose errors nobody catches."""

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], None] = print) -> None:
        """Begin a file.

        Args:
            folder: of the event files; made if missing.
            first_step: events of it and of later ones, in files from before, are hidden.
            say: gets one line if the file cannot be written; all later calls do nothing.
        """
        self._folder, self._say = folder, say
        self._records: RecordWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._records = RecordWriter((folder / name).open("ab"))
        except OSError as error:
            self._stop(error)
        self._write(Event(file_version=VERSION))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)])))

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture, uint8 [H, W, 3]."""
        self._write(Event(step=step, summary=summary.image(name, pixels, dataformats="HWC")))

    def close(self) -> None:
        """Finish the file."""
        if self._records is not None:
            self._records.close()  # all is written already

    def _write(self, event: Event) -> None:
        if self._records is None:
            return
        event.wall_time = time.time()
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        if self._records is not None:
            with suppress(OSError):  # it tries to write the rest once more
                self._records.close()
            self._records = None
        reason = error.strerror or error
        self._say(
            printable(f"spark-me: {self._folder}: TensorBoard's file cannot be written ({reason}): the run goes on")
        )
