"""Webdataset shards: tar archives of samples, read one after the other or, where local, at any place."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tarfile import ReadError
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from spark_me.config.data import PIPE
from spark_me.data.listing import Paths, Progress, any_hidden, is_there
from spark_me.data.reading import Encoded, is_image
from spark_me.data.unreadable import UnreadableImage, reason_of
from spark_me.errors import UserError, install_text, shown

MOST_NAMES = 1_000_000
"""More shards than any published data set has."""
MOST_NESTED = 20
"""Braces within braces; expanding recurses once for each."""
NUMBERS = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")
ENDLESS = re.compile(r"-?\d+\.\.-?\d+(?:\.\.-?\d+)?")
"""A range whose numbers are too long for `NUMBERS`."""


@dataclass
class _Group:
    """What stands between two braces, as far as it has been read."""

    start: int
    """Where it begins in the pattern."""
    commas: int = 0
    before: int = 0
    """Names that the alternatives before the last comma stand for."""
    names: int = 1
    """Names that the alternative since then stands for."""


def count_names(pattern: str) -> int:
    """How many names a pattern such as `{00..03}-{a,b}.tar` stands for, at most.

    Raises:
        ValueError: in one line, if braces are not balanced, are nested too deeply, or the names are too many.
    """
    groups = [_Group(0)]
    place = 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            place += 1
        elif character == "{":
            groups.append(_Group(place + 1))
            if len(groups) > MOST_NESTED:
                raise ValueError(f"braces are nested more than {MOST_NESTED} deep: write a simpler pattern")
        elif character == "," and len(groups) > 1:
            group = groups[-1]
            group.before, group.names, group.commas = group.before + group.names, 1, group.commas + 1
        elif character == "}":
            if len(groups) == 1:
                raise _unbalanced()
            group = groups.pop()
            groups[-1].names *= _names_of(group, pattern[group.start : place])
        if groups[-1].before + groups[-1].names > MOST_NAMES:
            raise ValueError(f"stands for more than {MOST_NAMES:,} shards: correct its ranges")
        place += 1
    if len(groups) > 1:
        raise _unbalanced()
    return groups[0].names


def _names_of(group: _Group, text: str) -> int:
    if group.commas:
        return group.before + group.names
    numbers = NUMBERS.fullmatch(text)
    if numbers:
        first, last, step = numbers.groups()
        return abs(int(last) - int(first)) // (int(step or 1) or 1) + 1
    if ENDLESS.fullmatch(text):
        return MOST_NAMES + 1
    return 52 if LETTERS.fullmatch(text) else group.names


def _unbalanced() -> ValueError:
    return ValueError("its braces are not balanced: close each { by a }, or write \\{ for one that is part of a name")


READING_ERRORS = (OSError, EOFError, ReadError, zlib.error, lzma.LZMAError)
"""What a missing, damaged or foreign archive raises."""
BLOCK = 512
CHUNK = 1 << 20
"""Bytes read at once: what is claimed is not asked for before it is there."""
LONGEST_NAME = 4096
"""Bytes; no file system has longer paths."""
LARGEST_EXTENSION = 1 << 20
"""Bytes of a header's extension, which may hold a file's attributes besides its name."""
LARGEST_MEMBER = 1 << 60

FILES = b"07\0"
SPARSE = b"S"
LONG_NAME, LONG_LINK = b"L", b"K"
EXTENSIONS, GLOBAL_EXTENSION = b"xX", b"g"
WITHOUT_CONTENT = b"123456"
"""Links, devices, folders and FIFOs, whatever size they claim."""
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"]\0\0": lzma.open}
"""What decompresses content, by how it begins."""
RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class Member(NamedTuple):
    """One thing in an archive."""

    name: str
    """As it is stored; what is no UTF-8 is kept as the system keeps it."""
    offset: int
    """Where its content begins in the archive."""
    size: int
    """Bytes."""
    is_file: bool
    """Not a link, a folder or a device."""


class Stream(Protocol):
    """What can be read once, from its beginning."""

    def read(self, size: int, /) -> bytes: ...


class Archive:
    """The members of an archive, in their order; the content of each may be read before the next is asked for."""

    def __init__(self, file: BinaryIO) -> None:
        """
        Args:
            file: at the archive's beginning. What is not read is sought past where it can be, else read and dropped.
        """
        self._file = file
        self._place = 0

    def __iter__(self) -> Iterator[Member]:
        """Every member, up to the mark that ends an archive.

        Raises:
            ReadError: for a damaged header, a sparse member, an end without its mark, and anything but zeros behind it.
            OSError: and others of `READING_ERRORS` if reading fails.
        """
        extended: dict[bytes, bytes] = {}
        while (header := self._block("its end mark is missing: it was cut off")).strip(b"\0"):
            member, kind = self._parse(header, extended)
            if kind in EXTENSIONS or kind == LONG_NAME:
                extended |= self._extension(member, kind)
            elif kind not in (LONG_LINK, GLOBAL_EXTENSION):
                extended = {}
                yield member
            self._skip(member.offset + -(-member.size // BLOCK) * BLOCK - self._place)
        while rest := self._file.read(CHUNK):
            if rest.strip(b"\0"):
                raise ReadError("it goes on behind its end mark: a part of it was overwritten, or archives were joined")

    def read(self, member: Member) -> bytes:
        """The content of the member that was handed out last, once.

        Raises:
            ReadError: if the archive ends within it.
        """
        return self._read(member.size)

    def _block(self, problem: str) -> bytes:
        block = self._file.read(BLOCK)
        if len(block) < BLOCK:
            raise ReadError(problem)
        self._place += BLOCK
        return block

    def _parse(self, header: bytes, extended: dict[bytes, bytes]) -> tuple[Member, bytes]:
        _require_checksum(header)
        kind = header[156:157]
        name = _text(header[:100])
        if header[257:263] == b"ustar\0" and header[345]:
            name = _text(header[345:500]) + b"/" + name
        size = _number(header[124:136])
        if kind not in EXTENSIONS + LONG_NAME + LONG_LINK + GLOBAL_EXTENSION:
            name = extended.get(b"path", name)
            size = _decimal(extended[b"size"]) if b"size" in extended else size
        decoded = name.decode(errors="surrogateescape")
        if len(name) > LONGEST_NAME:
            raise ReadError(f"a name of {len(name)} bytes ({shown(decoded)}): rename that file")
        if kind == SPARSE or any(key.startswith(b"GNU.sparse.") for key in extended):
            raise ReadError(f"{shown(decoded)} is stored sparsely: pack it again without --sparse")
        if size > LARGEST_MEMBER:
            raise ReadError(f"{shown(decoded)} claims {size} bytes: its header is damaged")
        is_file = kind in FILES and not decoded.endswith("/")
        return Member(decoded, self._place, 0 if kind in WITHOUT_CONTENT else size, is_file), kind

    def _extension(self, member: Member, kind: bytes) -> dict[bytes, bytes]:
        """What a header says of the member behind it."""
        if member.size > LARGEST_EXTENSION:
            raise ReadError(f"a header is extended by {member.size} bytes: it is damaged, or pack without attributes")
        content = self._read(member.size)
        return {b"path": _text(content)} if kind == LONG_NAME else dict(_records(content))

    def _read(self, size: int) -> bytes:
        chunks = []
        while size and (chunk := self._file.read(min(size, CHUNK))):
            chunks.append(chunk)
            size -= len(chunk)
            self._place += len(chunk)
        if size:
            raise ReadError("it ends within a file: it was cut off")
        return b"".join(chunks)

    def _skip(self, size: int) -> None:
        if size > BLOCK and self._file.seekable():
            self._file.seek(size - BLOCK, io.SEEK_CUR)  # nothing tells that this is beyond the end, but reading does
            self._place += size - BLOCK
            size = BLOCK
        while size:
            size -= len(self._read(min(size, CHUNK)))


def open_stream(stream: Stream) -> BinaryIO:
    """What a stream holds, decompressed if it is compressed by gzip, bzip2 or xz; itself if it is a plain file."""
    file = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(_Raw(stream), CHUNK)
    beginning = file.peek(8)
    opener = next((opener for magic, opener in OPENERS.items() if beginning.startswith(magic)), None)
    return file if opener is None else opener(file)  # type: ignore[operator]


class _Raw(io.RawIOBase):
    """A stream as Python's buffers want it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _require_checksum(header: bytes) -> None:
    said, rest = _number(header[148:156]), header[:148] + b" " * 8 + header[156:]
    difference = sum(rest) - said
    # Some old programs added up signed bytes.
    if difference and difference != 256 * sum(byte > 127 for byte in rest):
        raise ReadError("a header's checksum does not fit: it is damaged, or this is no tar archive")


def _number(field: bytes) -> int:
    """Octal digits, or base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise ReadError("a number in a header is none: it is damaged, or this is no tar archive")
    return int(digits or b"0", 8)


def _decimal(text: bytes) -> int:
    if not re.fullmatch(rb"\d{1,19}", text):
        raise ReadError(f"a size in a header is no number ({shown(text)})")
    return int(text)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of an extended header of POSIX: each record says its own length first."""
    place = 0
    content = content.rstrip(b"\0")
    while place < len(content):
        found = RECORD.match(content, place)
        end = place + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise ReadError("an extended header is damaged")
        yield found[2], content[found.end() : end - 1]
        place = end


METADATA = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset keeps for what is no sample."""
LARGEST_IMAGE = 1 << 30
"""Bytes. A shuffle buffer holds many images, and the file of a larger one is above every other limit, too."""


class Stored(NamedTuple):
    """An image in a local shard that is not compressed."""

    name: str
    path: str
    """The shard's."""
    offset: int
    size: int
    """Bytes."""

    def read(self) -> Encoded:
        """The image; a shard that went away or was cut off makes an unreadable one."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:  # it was there when the images were counted
            return Encoded(self.name, UnreadableImage(reason_of(error)))
        whole = len(content) == self.size
        return Encoded(self.name, content if whole else UnreadableImage("its shard was cut off"))


@dataclass(frozen=True)
class Shards:
    """Tar shards in a fixed order, to be read from their beginnings."""

    urls: list[str]
    """Paths, or `pipe:COMMAND`."""
    samples: int
    """Images in all of them together."""
    image_key: str | None = None
    """The extension that is the image's; the first of a known format when None."""

    def __len__(self) -> int:
        return self.samples

    def read(self, shard: int, later: Callable[[], bool] = lambda: False) -> Iterator[Encoded | Stored]:
        """The images of one shard in its order.

        Args:
            shard: which one.
            later: asked at each image whether only its place is wanted. What cannot be sought in is read all the same.

        Raises:
            UserError: if it cannot be read to its end.
        """
        url = self.urls[shard]
        count = 0
        try:
            with _opened(url) as stream:
                file = open_stream(stream)
                archive = Archive(file)
                for member in _images(archive, self.image_key):
                    name = f"{url}/{member.name}"
                    if file is stream and later():
                        yield Stored(name, url, member.offset, member.size)
                    else:
                        yield Encoded(name, archive.read(member))
                    count += 1
        except READING_ERRORS as error:
            raise UserError(
                f"{shown(url, 1000)}: cannot be read beyond its first {count} images ({reason_of(error)}): repair this "
                "shard, or leave it out of data.root; the same command goes on from the last checkpoint"
            ) from None

    def __iter__(self) -> Iterator[Encoded]:
        for shard in range(len(self.urls)):
            yield from self.read(shard)  # type: ignore[misc]


class TarImages:
    """Images of local shards, at any place."""

    def __init__(self, urls: Sequence[str], image_key: str | None = None) -> None:
        """Find every image.

        Raises:
            UserError: if a shard cannot be read.
        """
        self.paths = list(urls)
        # Arrays, as a tuple for each of millions of images takes much memory, in every worker.
        progress = Progress()
        members = []
        for place, path in enumerate(self.paths):
            progress.note(f"counting the images of {len(self.paths)} shards: {place} read, now {path}")
            members.append(_index(path, image_key))
        self._shard = np.repeat(np.arange(len(members)), [len(offsets) for offsets, _, _ in members])
        self._offset = np.concatenate([offsets for offsets, _, _ in members])
        self._size = np.concatenate([sizes for _, sizes, _ in members])
        self._names = Paths(chain.from_iterable(names for _, _, names in members))

    def __len__(self) -> int:
        return len(self._offset)

    def __getitem__(self, index: int, /) -> Encoded:
        path = self.paths[self._shard[index]]
        name = f"{path}/{self._names[index]}"
        return Stored(name, path, int(self._offset[index]), int(self._size[index])).read()


def expand(root: str, key: str) -> list[str]:
    """The shards of a brace pattern, in order.

    Raises:
        UserError: if the package that reads shards is missing, or a local shard, or the pattern is no pattern.
    """
    try:
        from webdataset.shardlists import envsubst, expand_urls
    except ImportError:
        raise UserError(f"data.kind=webdataset needs webdataset: {install_text('webdataset')}") from None
    try:
        count_names(root)
        count_names(envsubst(root))  # WDS_ variables may bring braces of their own
        urls: list[str] = expand_urls(root)
    except ValueError as error:
        raise UserError(f"{key}={root}: {error}") from None
    missing = [url for url in urls if not url.startswith(PIPE) and not is_there(Path(url), folder=False)]
    if missing:
        raise UserError(
            f"{key}={root}: no such file: {missing[0]} ({len(missing)} of {len(urls)} shards are missing): "
            "check the pattern, or read what is not local by pipe:COMMAND"
        )
    return urls


@contextmanager
def _opened(url: str) -> Iterator[Stream]:
    """A shard's bytes.

    Raises:
        OSError: if it cannot be opened, or its command fails.
    """
    from webdataset.gopen import gopen

    stream = gopen(url) if url.startswith(PIPE) else open(url, "rb")  # noqa: SIM115  (closed below)
    try:
        yield stream
    except READING_ERRORS:
        if not stream.read(1):
            stream.close()  # that of a command which failed, and so wrote too little, says so
        raise
    else:
        stream.close()
    finally:
        with suppress(OSError):  # of a command that was not read to its end
            stream.close()


def _images(archive: Archive, image_key: str | None) -> Iterator[Member]:
    """The first image of each sample: of files in a row whose names agree up to the first dot.

    Raises:
        ReadError: besides what the archive raises, if a sample has two files of one kind, or an image is too large.
    """
    sample, suffixes, found = "", set[str](), False
    for member in archive:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        if not (member.is_file and stem and dot) or any_hidden(member.name) or METADATA.match(member.name):
            continue
        if folder + slash + stem != sample:
            sample, suffixes, found = folder + slash + stem, set(), False
        if suffix.lower() in suffixes:
            raise ReadError(f"holds {shown(member.name)} twice")
        suffixes.add(suffix.lower())
        if found or not _is_image(suffix, image_key):
            continue
        if member.size > LARGEST_IMAGE:
            raise ReadError(
                f"{shown(member.name)} claims {member.size} bytes, and an image has {LARGEST_IMAGE} at most"
            )
        found = True
        yield member


def _index(path: str, image_key: str | None) -> tuple[np.ndarray, np.ndarray, Paths]:
    """Offsets, sizes and names of the images of a shard, one a sample."""
    offsets, sizes = array("q"), array("q")
    try:
        with open(path, "rb") as file:
            names = Paths(_noting(_images(Archive(file), image_key), offsets, sizes))
    except OSError as error:
        raise UserError(
            f"{shown(path, 1000)}: cannot be read ({error.strerror}): make it readable, or leave it out of data.root"
        ) from None
    except READING_ERRORS as error:
        raise UserError(
            f"{shown(path, 1000)}: is no whole, uncompressed tar archive ({reason_of(error)}): repair it, or read it "
            f"by {PIPE}COMMAND and give data.samples"
        ) from None
    return np.array(offsets), np.array(sizes), names


def _noting(images: Iterator[Member], offsets: array, sizes: array) -> Iterator[str]:
    for member in images:
        offsets.append(member.offset)
        sizes.append(member.size)
        yield member.name


def _is_image(suffix: str, image_key: str | None) -> bool:
    return suffix.lower() == image_key if image_key is not None else "." not in suffix and is_image(f"_.{suffix}")
