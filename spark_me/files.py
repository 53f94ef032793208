"""Writing files so that a crash, a kill or a full disk leaves the previous content whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from spark_me.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes `path`'s place only once it lies complete on the disk.

    Raises:
        UserError: if the disk is full or the place not writable; `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into one line.

    Raises:
        UserError: in place of an OSError, also of one that torch.save replaced by an error of its own.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({cause.strerror}): free space, or choose another place") from None


def check_output(path: Path | None, *inputs: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, or that would replace what is read, before any work is done.

    Args:
        path: file to write; None for none.
        inputs: files that are read; what is no path of a file, such as a URL, is left out.

    Raises:
        UserError: if it is a folder, its folder is missing or not writable, or it is one of the inputs.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist: create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable: choose another place")
    if path.exists():
        for source in inputs:
            if os.path.exists(source) and os.path.samefile(path, source):
                raise UserError(f"{path}: would replace {source}, which is read: name another file to write")


def check_output_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written to, before any work is done.

    Raises:
        UserError: if it or one above it is a file, or not writable.
    """
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"{path}: {nearest} is a file, not a folder: choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the folder {nearest} is not writable: choose another place")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", errors="surrogateescape"))


def _sync_directory(path: Path) -> None:
    # Without this the rename itself may be lost in a power cut.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
