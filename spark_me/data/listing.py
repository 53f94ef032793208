"""Looking through folders for images: each real folder once, nothing hidden, and what was left out is said."""

import heapq
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NoReturn, overload

import numpy as np
import torch

from spark_me.data.reading import is_image, suffix_of
from spark_me.errors import UserError

SECONDS = 2.0
"""Work that takes longer says what it is doing, again each time it has taken twice as long."""


class Progress:
    """Work that has just begun."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._say_after = SECONDS

    def note(self, what: str) -> None:
        """Say where the work is, if it is time to."""
        seconds = time.monotonic() - self._start
        if seconds > self._say_after:
            self._say_after *= 2
            say(f"{what} ({seconds:.0f} s so far)")


def say(line: str) -> None:
    """Print a line on stderr, of the processes of a job on the first alone: all of them look at the same images."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def files_text(number: int) -> str:
    """A number of files for people."""
    return f"{number:,} file" if number == 1 else f"{number:,} files"


class Paths(Sequence[Path]):
    """Paths in their order.

    A list of them costs each worker some 640 bytes a path: to look at a Python object is to write to its page, so that
    the page is copied. Here a path is made when it is asked for. The buffers are tensors, as torch hands those to
    workers in shared memory where they are not forked.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]] = ()) -> None:
        names = [os.fsencode(path) for path in paths]
        ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self._set(b"".join(names), ends)

    def _set(self, names: bytes, ends: np.ndarray) -> None:
        self._names = torch.from_numpy(np.frombuffer(names, dtype=np.uint8).copy())
        self._ends = torch.from_numpy(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int, /) -> Path: ...

    @overload
    def __getitem__(self, index: slice, /) -> "Paths": ...

    def __getitem__(self, index: int | slice, /) -> "Path | Paths":
        places = range(len(self))[index]
        return self.select(places) if isinstance(places, range) else Path(os.fsdecode(self._name(places)))

    def __iter__(self) -> Iterator[Path]:
        return (Path(os.fsdecode(name)) for name in self._many(range(len(self))))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Paths):
            return torch.equal(self._ends, other._ends) and torch.equal(self._names, other._names)
        return list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[Path]) -> "Paths":
        return Paths(chain(self, other))

    def __repr__(self) -> str:
        return f"<{len(self)} paths>"

    def select(self, places: Iterable[int]) -> "Paths":
        """Some of the paths, in the order of their places."""
        names = list(self._many(places))
        selected = Paths()
        selected._set(b"".join(names), np.cumsum([0, *map(len, names)], dtype=np.int64))
        return selected

    def _name(self, place: int) -> bytes:
        return next(self._many([place]))

    def _many(self, places: Iterable[int]) -> Iterator[bytes]:
        names, ends = self._names.numpy().data, self._ends.numpy()
        return (names[ends[place] : ends[place + 1]].tobytes() for place in places)


SYSTEM_FOLDERS = {"lost+found", "__MACOSX", "@eaDir"}
"""Of disks (which none but root may read), of archives made by macOS, of Synology's thumbnails."""
NAMED = 5
"""Kinds of files left out that are named."""


class Listing:
    """One look through one folder or several. No folder is read twice, however many links lead to it.

    Links are followed after all real folders, in the order of their names, so that what they lead to is listed in its
    own place where it has one. They are not followed upwards: what lies beside the root is not in it.
    """

    def __init__(self, root: Path) -> None:
        """
        Args:
            root: what the images are listed of, for messages and for what lies above it.
        """
        self.root = root
        self.hidden = 0
        """Files and folders left out by their names."""
        self.others: Counter[str] = Counter()
        """Files left out by their format: how many of each suffix."""
        self._seen = {str(folder) for folder in Path(os.path.realpath(root)).parents}
        self._found = 0
        self._progress = Progress()

    def images(self, folder: Path) -> Iterator[Path]:
        """The image files in a folder, at any depth, in no order.

        A name decides. What is no file in spite of it, a FIFO or a link to nothing, is an unreadable image.

        Raises:
            UserError: naming a folder that cannot be read: its images would be missing unnoticed.
        """
        self._seen.discard(os.path.realpath(folder))
        links = [str(folder)]
        while links:
            link = heapq.heappop(links)
            pending = [(link, os.path.realpath(link))]
            while pending:
                path, real = pending.pop()
                if real in self._seen:
                    continue
                self._seen.add(real)
                for entry in self._entries(path):
                    if not _is_folder(entry):
                        self._found += 1
                        yield Path(entry.path)
                    elif entry.is_symlink():
                        heapq.heappush(links, entry.path)
                    else:
                        pending.append((entry.path, os.path.join(real, entry.name)))

    def folders(self) -> list[Path]:
        """The folders right in the root, links to folders among them, sorted by name.

        `images` of one of them then leaves the others and the root out, wherever links lead.

        Raises:
            UserError: if the root cannot be read.
        """
        try:
            with os.scandir(self.root) as entries:
                folders = [entry.name for entry in entries if _is_folder(entry) and not is_hidden(entry.name)]
        except OSError as error:
            _refuse_folder(error)
        self._seen.update(os.path.realpath(path) for path in (self.root, *(self.root / name for name in folders)))
        return [self.root / name for name in sorted(folders)]

    def say_skipped(self) -> None:
        """Say on stderr in one line what was left out, if anything was; of several processes the first alone."""
        parts = []
        if self.others:
            kinds = ", ".join(f"{suffix or 'no suffix'} {number}" for suffix, number in self.others.most_common(NAMED))
            more = f" and {len(self.others) - NAMED} more kinds" if len(self.others) > NAMED else ""
            parts.append(f"{files_text(self.others.total())} of no format that is read ({kinds}{more})")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden by their names, or the system's")
        if parts:
            say(f"{self.root}: skipped {' and '.join(parts)}")

    def _entries(self, folder: str) -> Iterator["os.DirEntry[str]"]:
        """The images and folders in a folder."""
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        self.hidden += 1
                    elif is_image(entry.name) or _is_folder(entry):
                        yield entry
                    else:
                        self.others[suffix_of(entry.name)] += 1
                    self._progress.note(
                        f"{self.root}: looking for images, {files_text(self._found)} found, now in {folder}"
                    )
        except OSError as error:
            _refuse_folder(error)


def list_images(root: Path) -> list[Path]:
    """The images in a folder, at any depth, sorted; says what is left out.

    Raises:
        UserError: naming a folder that cannot be read.
    """
    listing = Listing(root)
    images = sorted(listing.images(root))
    listing.say_skipped()
    return images


def list_class_folders(root: Path) -> list[Path]:
    """The images in the folders of a folder, sorted, without those beside them; says what is left out.

    Raises:
        UserError: naming a folder that cannot be read, or if there are no class folders.
    """
    listing = Listing(root)
    folders = listing.folders()
    if not folders:
        raise UserError(f"{root}: has no class folders: use data.kind=images for images without labels")
    # Of two names of a folder, the one that is no link.
    once = {os.path.realpath(folder): folder for folder in sorted(folders, key=os.path.islink, reverse=True)}
    images = sorted(path for folder in once.values() for path in listing.images(folder))
    listing.say_skipped()
    return images


def class_folders(root: Path) -> dict[str, list[Path]]:
    """The images in each folder of a folder, those in its own folders too; both in order, as torchvision's ImageFolder.

    Raises:
        UserError: naming a folder that cannot be read, or two classes that are the same folder.
    """
    listing = Listing(root)
    folders = listing.folders()
    _refuse_twins(folders)
    found = {folder.name: sorted(listing.images(folder), key=_as_torchvision) for folder in folders}
    listing.say_skipped()
    return found


def is_there(path: Path, *, folder: bool) -> bool:
    """Whether a path is a folder, or a file.

    Raises:
        UserError: if it may not be looked at, as a folder above it is closed.
    """
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be looked at ({error.strerror}): make the folders above it readable, or correct the path"
        ) from None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden (`._` companions of macOS and thumbnails are), or the system's own."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def any_hidden(path: str) -> bool:
    """Whether a path in an archive leads through anything hidden."""
    return any(is_hidden(part) for part in path.split("/") if part not in ("", ".", ".."))


def _refuse_twins(folders: Iterable[Path]) -> None:
    names: dict[str, Path] = {}
    for folder in folders:
        twin = names.setdefault(os.path.realpath(folder), folder)
        if twin is not folder:
            raise UserError(f"{folder}: this class is the same folder as {twin.name}: remove one of them")


def _as_torchvision(path: Path) -> tuple[str, str]:
    return str(path.parent), path.name


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except PermissionError as error:  # a link that leads through a folder that is closed
        if is_image(entry.name):
            return False  # it will be an unreadable one
        _refuse_folder(error)
    except OSError:  # a link that leads to itself
        return False


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: this folder cannot be read ({error.strerror}): make it readable, or move it elsewhere"
    )
