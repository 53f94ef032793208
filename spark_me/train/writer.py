"""Writing checkpoints beside the training: training waits for a copy of the tensors, not for the disk."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spark_me.train.checkpoint import write_checkpoint


class CheckpointWriter:
    """Writes in one thread, one checkpoint at a time. Leaving its block waits for the last one."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[Path] | None = None

    def save(self, content: dict[str, Any], *, best: bool = False) -> None:
        """Begin to write what `checkpoint_of` returned, after the checkpoint before it is on the disk.

        Raises:
            UserError: if that one could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(write_checkpoint, self.folder, content, keep_last=self.keep_last, best=best)

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait.

        Raises:
            UserError: saying what and which checkpoint is the last good one.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            UserError: if it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: object) -> None:
        # An error in the block is what the user has to hear of; one of the last write was to be had by `wait`.
        self._thread.shutdown(wait=True)
