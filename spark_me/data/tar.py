"""Tar archives, read so that no damage goes by unnoticed.

Python's tarfile, which webdataset reads with, takes a damaged header for the archive's end. It also follows sizes that
are negative, reads names of gigabytes, and fills in what a sparse member leaves out.
"""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from tarfile import ReadError
from typing import BinaryIO, NamedTuple, Protocol

from spark_me.errors import shown

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
    """What a stream holds, decompressed if it is compressed by gzip, bzip2 or xz."""
    file = io.BufferedReader(_Raw(stream), CHUNK)
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
