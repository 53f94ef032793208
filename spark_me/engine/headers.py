"""Python's own C headers, which a fresh Debian lacks: found, or fetched from the distribution without root."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from spark_me.engine.cache import cache_dir, make_dir
from spark_me.errors import EngineError


def header_dirs() -> tuple[Path, ...]:
    """Folders to add to a build's include path: none where this Python has its Python.h.

    On Debian and its relatives the matching package is downloaded once into the per-user cache and unpacked there.

    Raises:
        EngineError: where that is not possible, with the command that installs the headers.
    """
    if has_python_headers():
        return ()
    include = fetched_headers()
    if not (include / _python() / "Python.h").is_file():
        _fetch()
    # The package's Python.h includes <x86_64-linux-gnu/python3.X/pyconfig.h> from the parent folder.
    return (include / _python(), include)


def has_python_headers() -> bool:
    """Whether this Python's include folder holds Python.h."""
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def fetched_headers() -> Path:
    """The cache's include folder for this Python; it exists only once headers were fetched."""
    return cache_dir() / "headers" / f"{_package()}-{platform.machine()}" / "usr" / "include"


def _fetch() -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise _missing("they cannot be fetched here")
    print(f"fetching {_package()}: this Python has no headers", flush=True)
    with tempfile.TemporaryDirectory(dir=make_dir("headers")) as name:
        directory = Path(name)
        package = _download(directory)
        unpacked = directory / "unpacked"
        subprocess.run(["dpkg", "-x", package, unpacked], capture_output=True)
        if not (unpacked / "usr" / "include" / _python() / "Python.h").is_file():
            raise _missing(f"{package.name} does not hold them")
        home = fetched_headers().parents[1]
        shutil.rmtree(home, ignore_errors=True)
        os.replace(unpacked, home)


def _download(directory: Path) -> Path:
    """Download the package with apt's lists, or with private ones where those are missing or stale."""
    said = _apt(directory, "download", _package())
    if not list(directory.glob("*.deb")):
        for needed in ("lists/partial", "cache/archives/partial"):
            (directory / needed).mkdir(parents=True)
        private = [f"-oDir::State::lists={directory / 'lists'}", f"-oDir::Cache={directory / 'cache'}"]
        _apt(directory, *private, "update")
        said = _apt(directory, *private, "download", _package())
    packages = sorted(directory.glob("*.deb"))
    if not packages:
        raise _missing(f"apt-get cannot download {_package()} ({said})")
    return packages[0]


def _apt(directory: Path, *arguments: str) -> str:
    """Run apt-get without a terminal and return its last word."""
    command = ["apt-get", "-qq", "-oDebug::NoLocking=true", *arguments]
    result = subprocess.run(
        command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return (result.stderr.strip().splitlines() or ["no message"])[-1]


def _missing(why: str) -> EngineError:
    return EngineError(
        f"the headers of Python {sys.version_info.major}.{sys.version_info.minor} (Python.h) are missing and {why}: "
        f"install them with `sudo apt-get install {_python()}-dev`, then run again"
    )


def _python() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _package() -> str:
    return f"lib{_python()}-dev"
