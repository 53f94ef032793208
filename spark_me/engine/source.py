"""MinkowskiEngine's source archive: fetched from the package index, checked, unpacked; its setup.py never runs."""

import os
import tarfile
import tempfile
from pathlib import Path

import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple, UnsupportedContentTypeError

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.cache import make_dir
from spark_me.errors import EngineError
from spark_me.files import sha256_of

ARCHIVE_NAME = f"{ENGINE_NAME}-{ENGINE_VERSION}.tar.gz"
ARCHIVE_BYTES = 246_705
ARCHIVE_SHA256 = "b1879c00d0b0b1d30ba622cce239886a7e3c78ee9da1064cdfe2f64c2ab15f94"


def get_archive(source: Path | None = None) -> Path:
    """The checked source archive: `source` if given, else the cached one, else a download.

    Raises:
        EngineError: if it cannot be had, or is not the archive that our edits were written for.
    """
    if source is not None:
        return _given_archive(source)
    cached = make_dir("source") / ARCHIVE_NAME
    if cached.is_file() and sha256_of(cached) == ARCHIVE_SHA256:
        return cached
    _download(cached)
    return cached


def unpack(archive: Path, directory: Path) -> Path:
    """Unpack the archive below `directory` and return the source tree.

    Only files and folders that stay inside are written. (tarfile's own filter does this too, but is missing from the
    Python 3.11.2 of Debian 12.)

    Raises:
        EngineError: if the archive is damaged, or holds anything else.
    """
    root = directory.resolve()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _unpack_member(tar, member, root)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise EngineError(f"{archive} cannot be unpacked ({error}): delete it and run again") from error
    return directory / f"{ENGINE_NAME}-{ENGINE_VERSION}"


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    path = (root / member.name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{member.name} would land outside")
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
    elif content := tar.extractfile(member) if member.isfile() else None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.read())
    else:
        raise ValueError(f"{member.name} is neither a file nor a folder")


def _given_archive(source: Path) -> Path:
    if not source.is_file():
        raise EngineError(f"--source {source}: no such file; give the path of {ARCHIVE_NAME}")
    _check(source, f"--source {source}")
    return source


def _download(destination: Path) -> None:
    handle, name = tempfile.mkstemp(dir=destination.parent, prefix=ARCHIVE_NAME)
    os.close(handle)
    partial = Path(name)
    try:
        _fetch(partial)
        _check(partial, f"the downloaded {ARCHIVE_NAME}")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, destination)
    finally:
        partial.unlink(missing_ok=True)


def _fetch(destination: Path) -> None:
    """Download the archive with the index and the certificates that pip is told to use."""
    try:
        with PyPISimple(endpoint=os.environ.get("PIP_INDEX_URL") or PYPI_SIMPLE_ENDPOINT) as client:
            if certificates := os.environ.get("PIP_CERT"):
                client.s.verify = certificates
            page = client.get_project_page(ENGINE_NAME, timeout=60)
            packages = [package for package in page.packages if package.filename == ARCHIVE_NAME]
            if not packages:
                raise EngineError(
                    f"the package index offers no {ARCHIVE_NAME}: get it elsewhere and pass --source FILE"
                )
            # Our own pinned digest is checked afterwards, whatever the index claims.
            client.download_package(packages[0], destination, verify=False, timeout=60, progress=_AtMost)
    except (requests.RequestException, NoSuchProjectError, UnsupportedContentTypeError) as error:
        raise EngineError(
            f"{ARCHIVE_NAME} cannot be downloaded ({type(error).__name__}): check the network or PIP_INDEX_URL, "
            "or pass --source FILE"
        ) from error


class _AtMost:
    """Ends a download that is larger than the archive, which is of one size: a server may send for ever."""

    def __init__(self, announced: int | None) -> None:
        self._received = 0

    def __enter__(self) -> "_AtMost":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, received: int) -> None:
        """Note that so many more bytes have come."""
        self._received += received
        if self._received > ARCHIVE_BYTES:
            raise EngineError(
                f"the downloaded {ARCHIVE_NAME} is larger than the {ENGINE_NAME} {ENGINE_VERSION} that spark_me "
                "builds; nothing was kept: check PIP_INDEX_URL, or pass --source FILE"
            )


def _check(archive: Path, what: str) -> None:
    found = sha256_of(archive)
    if found != ARCHIVE_SHA256:
        raise EngineError(
            f"{what} is not the {ENGINE_NAME} {ENGINE_VERSION} that spark_me builds: "
            f"sha256 {found[:12]}…, expected {ARCHIVE_SHA256[:12]}…; nothing was kept"
        )
