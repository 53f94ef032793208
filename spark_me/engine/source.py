"""MinkowskiEngine's source archive: fetched, checked, unpacked without running its setup.py; and the per-user cache."""

import fcntl
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple, UnsupportedContentTypeError

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.errors import EngineError
from spark_me.files import atomic_write, sha256_of, write_text

ARCHIVE_NAME = f"{ENGINE_NAME}-{ENGINE_VERSION}.tar.gz"
ARCHIVE_BYTES = 246_705
ARCHIVE_SHA256 = "b1879c00d0b0b1d30ba622cce239886a7e3c78ee9da1064cdfe2f64c2ab15f94"


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
        return _digest_file(wheel).read_bytes().strip() == sha256_of(wheel).encode()
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


def get_archive(source: Path | None = None) -> Path:
    """The checked source archive: `source` if given, else the cached one, else a download.

    Raises:
        EngineError: if it cannot be had, or is not the archive that our edits were written for.
    """
    if source is not None:
        if not source.is_file():
            raise EngineError(f"--source {source}: no such file; give the path of {ARCHIVE_NAME}")
        _check(sha256_of(source), f"--source {source}")
        return source
    cached = make_dir("source") / ARCHIVE_NAME
    if not cached.is_file() or sha256_of(cached) != ARCHIVE_SHA256:
        content = _download()
        _check(hashlib.sha256(content).hexdigest(), f"the downloaded {ARCHIVE_NAME}")
        with atomic_write(cached, alone=False) as file:
            file.write(content)
    return cached


def _check(found: str, what: str) -> None:
    if found != ARCHIVE_SHA256:
        raise EngineError(
            f"{what} is not the {ENGINE_NAME} {ENGINE_VERSION} that spark_me builds: "
            f"sha256 {found[:12]}…, expected {ARCHIVE_SHA256[:12]}…; nothing was kept"
        )


def _download() -> bytes:
    """The archive from the index, and with the certificates, that pip is told to use; no more than its size."""
    content = b""
    try:
        with PyPISimple(endpoint=os.environ.get("PIP_INDEX_URL") or PYPI_SIMPLE_ENDPOINT) as client:
            client.s.verify = os.environ.get("PIP_CERT") or client.s.verify
            packages = client.get_project_page(ENGINE_NAME, timeout=60).packages
            urls = [package.url for package in packages if package.filename == ARCHIVE_NAME]
            if not urls:
                raise EngineError(
                    f"the package index offers no {ARCHIVE_NAME}: get it elsewhere and pass --source FILE"
                )
            with client.s.get(urls[0], stream=True, timeout=60) as response:
                response.raise_for_status()
                for block in response.iter_content(1 << 16):
                    content += block
                    if len(content) > ARCHIVE_BYTES:  # a server may send for ever
                        raise EngineError(
                            f"the downloaded {ARCHIVE_NAME} is larger than the {ENGINE_NAME} {ENGINE_VERSION} that "
                            "spark_me builds; nothing was kept: check PIP_INDEX_URL, or pass --source FILE"
                        )
    except (requests.RequestException, NoSuchProjectError, UnsupportedContentTypeError) as error:
        raise EngineError(
            f"{ARCHIVE_NAME} cannot be downloaded ({type(error).__name__}): check the network or PIP_INDEX_URL, "
            "or pass --source FILE"
        ) from error
    return content


def unpack(archive: Path, directory: Path) -> Path:
    """Unpack the archive below `directory` and return the source tree.

    Only files that stay inside are written. (tarfile's own filter does this too, but is missing from the Python 3.11.2
    of Debian 12.)

    Raises:
        EngineError: if the archive is damaged, or holds anything else.
    """
    root = directory.resolve()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = (root / member.name).resolve()
                if not path.is_relative_to(root) or not (member.isfile() or member.isdir()):
                    raise ValueError(f"{member.name} is no file or folder, or would land outside")
                if content := tar.extractfile(member):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise EngineError(f"{archive} cannot be unpacked ({error}): delete it and run again") from error
    return directory / f"{ENGINE_NAME}-{ENGINE_VERSION}"
