"""Webdataset shards: tar archives of samples, read one after the other or, where local, at any place."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spark_me.config_data import PIPE
from spark_me.data.braces import count_names
from spark_me.data.formats import is_image
from spark_me.data.listing import any_hidden
from spark_me.data.progress import Progress
from spark_me.data.reading import Encoded
from spark_me.errors import UserError, install_text

READING_ERRORS = (OSError, tarfile.TarError, EOFError, ValueError)
"""What a missing, truncated or foreign shard raises, and a command that fails."""


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
        from webdataset import tarfile_samples

        url = self.urls[shard]
        count = 0
        try:
            for sample in tarfile_samples(iter([{"url": url}])):
                image = _image_of(sample, url, self.image_key)
                if image is not None:
                    yield image
                    count += 1
        except READING_ERRORS as error:
            raise UserError(
                f"{url}: cannot be read beyond its first {count} images ({_reason(error)}): repair this shard, or "
                "leave it out of data.root; the same command goes on from the last checkpoint"
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
        self._name = np.concatenate([names for _, _, names in members])

    def __len__(self) -> int:
        return len(self._offset)

    def __getitem__(self, index: int, /) -> Encoded:
        path = self.paths[self._shard[index]]
        name = f"{path}/{self._name[index].decode(errors='surrogateescape')}"
        with open(path, "rb") as file:
            file.seek(self._offset[index])
            return Encoded(name, file.read(self._size[index]))


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
    missing = [url for url in urls if not url.startswith(PIPE) and not Path(url).is_file()]
    if missing:
        raise UserError(
            f"{key}={root}: no such file: {missing[0]} ({len(missing)} of {len(urls)} shards are missing): "
            "check the pattern, or read what is not local by pipe:COMMAND"
        )
    return urls


def _index(path: str, image_key: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, sizes and names of the images of a shard, one a sample."""
    images: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                sample, _, suffix = name.partition(".")
                if member.isreg() and sample and _is_image(suffix, image_key) and not any_hidden(member.name):
                    images.setdefault(f"{folder}/{sample}", member)
    except READING_ERRORS as error:
        raise UserError(
            f"{path}: is no whole, uncompressed tar archive ({error}): repair it, or read it by "
            f"{PIPE}COMMAND and give data.samples"
        ) from None
    members = list(images.values())
    offsets = np.array([member.offset_data for member in members], dtype=np.int64)
    sizes = np.array([member.size for member in members], dtype=np.int64)
    names = np.array([member.name.encode(errors="surrogateescape") for member in members], dtype=bytes)
    return offsets, sizes, names


def _image_of(sample: dict[str, Any], url: str, image_key: str | None) -> Encoded | None:
    if any_hidden(sample["__key__"]):
        return None
    for suffix, content in sample.items():
        if not suffix.startswith("__") and _is_image(suffix, image_key):
            return Encoded(f"{url}/{sample['__key__']}.{suffix}", content)
    return None


def _reason(error: Exception) -> str:
    # webdataset appends what it was reading from.
    text = getattr(error, "strerror", None) or str(error.args[0] if error.args else "")
    return f"{type(error).__name__}: {text.partition(' @ ')[0]}"


def _is_image(suffix: str, image_key: str | None) -> bool:
    return suffix.lower() == image_key if image_key is not None else "." not in suffix and is_image(f"_.{suffix}")
