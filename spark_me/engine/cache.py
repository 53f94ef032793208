"""The per-user cache: source archives, built wheels, build logs, headers."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spark_me.errors import EngineError
from spark_me.files import sha256_of, write_text


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
    """The wheel that was built under `key`, or None; a damaged one, or one without its digest, counts as missing.

    A wheel is code that runs. The digest beside it finds damage and files that were put there by other means; whoever
    may write to the folder can write both, so one that others may write to is refused.

    Raises:
        EngineError: if others may write to the cache.
    """
    folder = cache_dir() / "wheels" / key
    for wheel in sorted(folder.glob("*.whl")):
        _require_own(folder)
        if is_as_built(wheel):
            return wheel
        print(f"{wheel.name} in the cache is not as it was built, or has no digest: it is built again", flush=True)
    return None


def store_wheel(wheel: Path, key: str) -> Path:
    """Move a finished wheel into the cache in one step, so that a reader sees all of it or nothing.

    Raises:
        EngineError: if others may write to the cache.
    """
    with wheel.open("rb") as file:
        os.fsync(file.fileno())
    folder = make_dir("wheels", key)
    _require_own(folder)
    stored = folder / wheel.name
    write_text(_digest_file(stored), sha256_of(wheel))  # a wheel without its own counts as missing
    os.replace(wheel, stored)
    return stored


def is_as_built(wheel: Path) -> bool:
    """Whether a wheel in the cache has the digest that was written when it was built."""
    try:
        return _digest_file(wheel).read_text(encoding="ascii", errors="replace").strip() == sha256_of(wheel)
    except OSError:
        return False


def _digest_file(wheel: Path) -> Path:
    return wheel.with_name(f"{wheel.name}.sha256")


def _require_own(folder: Path) -> None:
    """Refuse a folder of wheels, or one above it in the cache, that another user may write to."""
    for place in (folder, folder.parent, cache_dir()):
        status = place.stat()
        by_group = status.st_mode & stat.S_IWGRP and status.st_gid != os.getgid()  # many users are their own group
        if status.st_uid not in (0, os.getuid()) or status.st_mode & stat.S_IWOTH or by_group:
            raise EngineError(
                f"{place}: others may write to it, and the engine in it is code that runs: `chmod go-w` it if it is "
                "yours, or choose another cache by SPARK_ME_CACHE"
            )


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
