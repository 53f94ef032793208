"""Writing files so that a crash, a kill or a full disk leaves the previous content whole, and where they may lie."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from spark_me.errors import UserError

LONGEST_NAME = 200
"""Bytes; file systems take 255, and what is written first beside a file has a longer name."""
LONGEST_TEXT = 8192
"""Characters of a text that a name is taken from: decoding may take as many rounds as it has characters."""


TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp\.(?P<name>.+)", re.DOTALL)
"""Names of files that are being written: nobody can guess them, and they end as the files that they become."""
_open_here: set[Path] = set()
"""Those that this process is writing."""


@contextmanager
def atomic_write(path: Path, *, alone: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that takes `path`'s place only once it lies complete on the disk.

    It keeps the mode of the file whose place it takes. Of a link, the file that it leads to is replaced. What is no
    file, such as /dev/stdout or a FIFO, is written straight into.

    Args:
        path: where to write.
        alone: refuse if another process is writing the same file; else whoever ends last wins.

    Raises:
        UserError: if another process is writing it, the disk is full or the place not writable; `path` is as before.
    """
    with writing(path):
        if _is_stream(path):
            with path.open("wb") as file:
                yield file
            return
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        with _temporary(path) as file:
            if clear_leftovers(path.parent, path.name) and alone:
                raise UserError(f"{path}: another process is writing it now: wait for its end, or name another file")
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        _sync_directory(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes `path`'s place only once the block has ended.

    What killed processes left of the same folder is deleted.

    Args:
        path: an empty folder, or none yet.

    Raises:
        UserError: if the disk is full, the place not writable, or `path` filled by then; `path` is as before.
    """
    path = Path(os.path.realpath(path))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for entry in list(os.scandir(path.parent)):
            match = TEMPORARY.fullmatch(entry.name)
            if match and match["name"] == path.name and entry.is_dir(follow_symlinks=False):
                with _locked_folder(Path(entry.path)) as own:
                    if own:
                        shutil.rmtree(entry.path, ignore_errors=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp.{path.name}")
        temporary.mkdir()
        try:
            with _locked_folder(temporary):
                yield temporary
                os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_directory(path.parent)


@contextmanager
def _locked_folder(path: Path) -> Iterator[bool]:
    """Whether its lock, which ends with the process, was free; held within the block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody's, or a file system without locks, where nobody can tell
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def clear_leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Delete what killed processes left of files that they were writing.

    Args:
        folder: where they were writing.
        name: of which file; of all when None.

    Returns:
        What other processes are writing now.
    """
    alive = []
    for entry in list(os.scandir(folder)):
        match, path = TEMPORARY.fullmatch(entry.name), Path(entry.path)
        if match is None or name not in (None, match["name"]) or path in _open_here:
            continue
        try:
            # Whoever writes it holds its lock, which is the system's and ends with the process.
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # finished by now, or not ours to write
            continue
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except (BlockingIOError, PermissionError):
            alive.append(path)
        except OSError:  # a file system without locks, where nobody can tell
            continue
        finally:
            os.close(descriptor)
    return alive


@contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    """A new file beside another one, with its mode and locked; deleted where the block fails."""
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    while True:
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp.{path.name}")
        _open_here.add(temporary)
        file = temporary.open("xb")  # never what lies there already, be it a link
        if _locked(file) and temporary.exists():  # else somebody took it for a leftover, just before
            break
        file.close()
        _open_here.remove(temporary)
    try:
        with file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        _open_here.remove(temporary)


def _locked(file: BinaryIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is_stream(path: Path) -> bool:
    """Whether it is there and no file: a device, a FIFO, or another name of what is open, such as /dev/stdout."""
    if not path.exists():
        return False
    place = path.absolute()
    if place.is_symlink():
        place = place.parent / os.readlink(place)
    return not stat.S_ISREG(path.stat().st_mode) or os.path.realpath(place.parent).startswith("/proc/")


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
    if _is_stream(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{path}: is not writable: choose another place")
        return
    folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise UserError(f"{path}: the folder {folder} does not exist: create it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: the folder {folder} is not writable: choose another place")
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


def is_file(path: Path) -> bool:
    """Whether it is a file; a name that is too long for any is none."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def plain_name(text: str, suffixes: Collection[str] = ()) -> str:
    """The name of a file, from a text that comes from outside: its last component, with nothing that leads elsewhere.

    Whatever the text hides by percent-encoding is decoded first, however often it was encoded.

    Args:
        text: a path, the path of a URL, or a name.
        suffixes: in lower case; the name must end in one of them, if any are given.

    Raises:
        UserError: if what is left is no name, hidden, too long, holds what cannot be printed, or has another suffix.
    """
    name = decoded = text[: LONGEST_TEXT + 1]
    while (decoded := unquote(name)) != name:
        name = decoded
    name = name.replace("\\", "/").rpartition("/")[2]
    if not name.strip(" ."):
        problem = "it names no file"
    elif name.startswith("."):
        problem = "the name begins with a dot"
    elif len(text) > LONGEST_TEXT or len(name.encode(errors="surrogateescape")) > LONGEST_NAME:
        problem = "the name is too long"
    elif not name.isprintable():
        problem = "the name holds characters that cannot be printed"
    elif suffixes and not name.lower().endswith(tuple(suffixes)):
        problem = f"the name does not end in {' or '.join(suffixes)}"
    else:
        return name
    raise UserError(f"{text}: cannot be the name of a file ({problem}): give the file a plain name")


def file_in(folder: Path, text: str, suffixes: Collection[str] = ()) -> Path:
    """The place in a folder for a file whose name comes from outside.

    Raises:
        UserError: as `plain_name`.
    """
    path = folder / plain_name(text, suffixes)
    # Never true by now; what is written here may be code elsewhere, so it is asked of the path itself, too.
    if os.path.dirname(os.path.abspath(path)) != os.path.abspath(folder):
        raise UserError(f"{text}: would lie outside {folder}: give the file a plain name")
    return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", errors="surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """Replace a file of JSON atomically. It is ASCII, and null where a number is infinite or none, which JSON lacks."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync_directory(path: Path) -> None:
    # Without this the rename itself may be lost in a power cut.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
