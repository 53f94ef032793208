"""The per-user cache: source archives, built wheels, build logs, headers."""

import fcntl
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """Where spark_me keeps what may be made again: $SPARK_ME_CACHE, $XDG_CACHE_HOME/spark_me, or ~/.cache/spark_me."""
    if own := os.environ.get("SPARK_ME_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spark_me"


def make_dir(*parts: str) -> Path:
    """A directory in the cache, made if missing."""
    directory = cache_dir().joinpath(*parts)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def cached_wheel(key: str) -> Path | None:
    """The wheel that was built under `key`, or None. A damaged one counts as missing."""
    for wheel in sorted((cache_dir() / "wheels" / key).glob("*.whl")):
        if zipfile.is_zipfile(wheel):
            return wheel
    return None


def store_wheel(wheel: Path, key: str) -> Path:
    """Move a finished wheel into the cache in one step, so that a reader sees all of it or nothing."""
    with wheel.open("rb") as file:
        os.fsync(file.fileno())
    stored = make_dir("wheels", key) / wheel.name
    os.replace(wheel, stored)
    return stored


@contextmanager
def locked(key: str) -> Iterator[None]:
    """Hold the lock of one build; a second process waits here and then finds the finished wheel."""
    with (make_dir("locks") / f"{key}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process is building this engine: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
