"""Webdataset shards: tar archives of samples, read one after the other or, where local, at any place."""

import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tarfile import ReadError

import numpy as np

from spark_me.config_data import PIPE
from spark_me.data.braces import count_names
from spark_me.data.formats import is_image
from spark_me.data.listing import any_hidden, is_there
from spark_me.data.paths import Paths
from spark_me.data.progress import Progress
from spark_me.data.reading import Encoded
from spark_me.data.tar import READING_ERRORS, Archive, Member, Stream, open_stream
from spark_me.data.unreadable import UnreadableImage, reason_of
from spark_me.errors import UserError, install_text, shown

METADATA = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset keeps for what is no sample."""
LARGEST_IMAGE = 1 << 30
"""Bytes. A shuffle buffer holds many images, and the file of a larger one is above every other limit, too."""


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

    def read(self, shard: int) -> Iterator[Encoded]:
        """The images of one shard in its order.

        Raises:
            UserError: if it cannot be read to its end.
        """
        url = self.urls[shard]
        count = 0
        try:
            with _opened(url) as stream:
                archive = Archive(open_stream(stream))
                for member in _images(archive, self.image_key):
                    yield Encoded(f"{url}/{member.name}", archive.read(member))
                    count += 1
        except READING_ERRORS as error:
            raise UserError(
                f"{shown(url, 1000)}: cannot be read beyond its first {count} images ({reason_of(error)}): repair this "
                "shard, or leave it out of data.root; the same command goes on from the last checkpoint"
            ) from None

    def __iter__(self) -> Iterator[Encoded]:
        for shard in range(len(self.urls)):
            yield from self.read(shard)


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
        path, size = self.paths[self._shard[index]], int(self._size[index])
        name = f"{path}/{self._names[index]}"
        try:
            with open(path, "rb") as file:
                file.seek(self._offset[index])
                content = file.read(size)
        except OSError as error:  # it was there when the images were counted
            return Encoded(name, UnreadableImage(reason_of(error)))
        return Encoded(name, content if len(content) == size else UnreadableImage("its shard was cut off"))


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
