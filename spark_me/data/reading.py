"""Reading one image: what is no image, damaged or dangerously large becomes a reason, not a crash."""

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError, features
from torch import Tensor

from spark_me.data import arrays
from spark_me.data.unreadable import UnreadableImage, unreadable_if_it_fails

NPY = ".npy"
TIFF = (".tif", ".tiff")
NO_PICTURES = {"EPS", "MPEG", "IPTC"}
"""Registered by Pillow, but not to be opened: it would hand the first to another program, reads only the second's size,
and the third's text is no image."""
CODECS = {"JPEG2000": "jpg_2000", "WEBP": "webp", "AVIF": "avif"}
"""Formats whose files Pillow may know by name without being built to decode them."""


@cache
def pillow_formats() -> tuple[str, ...]:
    """Formats that are opened, in the order in which Pillow tries them."""
    Image.preinit()  # the commonest first
    Image.init()
    return tuple(name for name in Image.ID if _opens(name))


@cache
def suffixes() -> frozenset[str]:
    """Ends of the names of files that are taken for images, in lower case, with the dot."""
    formats = {*pillow_formats(), "MPO"}  # which is opened as JPEG: the first of several pictures
    return frozenset([NPY, *(suffix for suffix, name in Image.registered_extensions().items() if name in formats)])


def is_image(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of an image, whatever the file holds."""
    return suffix_of(name) in suffixes()


def suffix_of(name: str | os.PathLike[str]) -> str:
    """The end of a name from its last dot on, in lower case; empty if there is none."""
    return os.path.splitext(os.fspath(name).lower())[1]


def _opens(name: str) -> bool:
    if name in NO_PICTURES or (name in CODECS and not features.check(CODECS[name])):
        return False
    # A stub knows the format, but needs a decoder that somebody else installs.
    opener = Image.OPEN[name][0]
    return not (isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile))


MODES = {1: "L", 3: "RGB"}
JPEG = ("JPEG", "MPO")
"""The second holds several, of which the first is shown."""
BITS_PER_SAMPLE = 258
"""A TIFF's tag."""
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Encoded(NamedTuple):
    """An image that is no file of its own."""

    name: str
    """Where it comes from; its end says what it is, as a file's does."""
    content: bytes | np.ndarray | UnreadableImage
    """What a file would hold, pixels [H, W, C], or why there is neither."""

    def __str__(self) -> str:
        return self.name


Item: TypeAlias = Path | Encoded
"""Something to read an image from; as text, its name."""


class Items(Protocol):
    """Images that can be read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


Picture: TypeAlias = Image.Image | Tensor
"""8-bit RGB or grey, or float32 [C, H, W] with NaN in all channels of nodata pixels."""


class Place(NamedTuple):
    """Where the whole image lies in one that was decoded smaller."""

    height: int
    """Of the whole image as it is shown, in pixels."""
    width: int
    reduction: int
    """Its pixels along each side of a pixel: 2, 4 or 8."""
    top: float
    """Where it begins, 0 or less than a pixel from there: its last pixels may be too few for a whole one, and turning
    the image upright may bring these to its beginning."""
    left: float


@dataclass(frozen=True)
class Reduced:
    """A JPEG that was decoded smaller than it is stored."""

    image: Image.Image
    """8-bit RGB or grey."""
    place: Place

    def resize(self, box: Sequence[int], size: Sequence[int], resample: Image.Resampling) -> Image.Image:
        """The box (top, left, height, width) of the whole image, resized to (H, W)."""
        (top, left, height, width), (_, _, reduction, y, x) = box, self.place
        edges = (left / reduction, top / reduction, (left + width) / reduction, (top + height) / reduction)
        return self.image.resize((size[1], size[0]), resample, (x + edges[0], y + edges[1], x + edges[2], y + edges[3]))


Reduction: TypeAlias = Callable[[int, int], int]
"""How much smaller an image of (H, W) may be decoded: a number of `REDUCTIONS`, or 1."""
REDUCTIONS = (8, 4, 2)
"""What JPEG can be decoded at without computing the whole: its blocks are 8 pixels wide."""


def read_image(item: Item, channels: int, nodata: float | None = None) -> Picture:
    """Decode an image wholly.

    Args:
        item: a file or its content.
        channels: 3 converts to RGB and 1 to grey; others must be what the image has.
        nodata: the stored value of pixels without data, see `DataConfig.nodata`.

    Raises:
        UnreadableImage: for what is missing, no image, truncated, above Pillow's limit of pixels, not finite, or has
            other channels.
    """
    return to_picture(decode(item, channels), channels, nodata)


def read_reduced(item: Item, channels: int, nodata: float | None, reduction: Reduction) -> Picture | Reduced:
    """`read_image`, but a JPEG is decoded as much smaller as its size as it is shown allows."""
    place: Place | None = None

    def draft(image: Image.Image) -> None:
        nonlocal place
        place = _draft(image, reduction)

    with unreadable_if_it_fails():
        # What is judged as it is stored, pixel by pixel or by its channels, is read wholly.
        decoded = _decode(item, channels, draft if nodata is None and channels in MODES else None)
    picture = to_picture(decoded, channels, nodata)
    return Reduced(picture, place) if place and isinstance(picture, Image.Image) else picture


def _draft(image: Image.Image, reduction: Reduction) -> Place | None:
    """Have an image that was opened decoded smaller; None if it has to be decoded wholly."""
    orientation, (width, height) = arrays.orientation_of(image), image.size
    shown = (width, height) if orientation in arrays.TURNED else (height, width)
    times = reduction(*shown)
    if times == 1 or image.draft(None, (width // times, height // times)) is None:
        return None
    top, left = (-side % times / times for side in shown)
    from_below, from_the_right = orientation in arrays.FROM_BELOW, orientation in arrays.FROM_THE_RIGHT
    return Place(*shown, times, top * from_below, left * from_the_right)


def to_picture(decoded: Image.Image | np.ndarray, channels: int, nodata: float | None = None) -> Picture:
    """Convert a decoded image to what training sees: upright, and of RGB or grey what is transparent on white.

    Raises:
        UnreadableImage: if it has other channels, pixels that are not finite, or does not load.
    """
    with unreadable_if_it_fails():
        return _to_picture(decoded, channels, nodata)


def _to_picture(decoded: Image.Image | np.ndarray, channels: int, nodata: float | None) -> Picture:
    if isinstance(decoded, Image.Image):
        if channels not in MODES and len(decoded.getbands()) != channels:
            bands = len(decoded.getbands())
            raise UnreadableImage(arrays.other_channels(bands, channels, f" (mode {decoded.mode})"))
        arrays.load(decoded)  # which one that was handed over may still need
        if min(decoded.size) < 1:
            raise UnreadableImage(f"has no pixels (height×width {decoded.height}×{decoded.width})")
        decoded = arrays.upright(decoded)
        if channels not in MODES:
            return _to_tensor(decoded, nodata)
        shown = arrays.on_background(decoded, MODES[channels])
        if nodata is None:
            return shown
        return _to_tensor(shown, nodata, arrays.straight(decoded).convert(MODES[channels]))
    return _to_tensor(decoded, nodata)


def _to_tensor(
    shown: Image.Image | np.ndarray, nodata: float | None, stored: Image.Image | np.ndarray | None = None
) -> Tensor:
    pixels, as_stored = (
        arrays.with_channels(np.asarray(image)) for image in (shown, shown if stored is None else stored)
    )
    return torch.from_numpy(arrays.to_float(pixels, nodata, as_stored))


def decode(item: Item, channels: int) -> Image.Image | np.ndarray:
    """Decode an image as it is stored: whatever Pillow reads in 8 bits, else an array [H, W, C].

    Raises:
        UnreadableImage: as `read_image`.
    """
    with unreadable_if_it_fails():
        return _decode(item, channels)


def _decode(item: Item, channels: int, draft: Callable[[Image.Image], None] | None = None) -> Image.Image | np.ndarray:
    if isinstance(item, Path):
        _require_regular(item)
    content = item.content if isinstance(item, Encoded) else item
    if isinstance(content, UnreadableImage):
        raise content
    if isinstance(content, np.ndarray):
        return arrays.check(content, channels)
    name = str(item).lower()
    if name.endswith(NPY):
        return arrays.read_npy(content, channels)
    if name.endswith(TIFF) and channels not in MODES:
        return arrays.read_tiff(content, channels)
    try:
        return _decode_by_pillow(content, channels, draft)
    except _NotForPillow as reason:
        if name.endswith(TIFF):
            return arrays.read_tiff(content, channels)
        raise UnreadableImage(str(reason)) from None


def _require_regular(path: Path) -> None:
    # To open a FIFO is to wait for whoever writes to it, and a device may have no end.
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UnreadableImage(f"is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")


class _NotForPillow(Exception):
    """Pillow does not know the format, or would clip or truncate the pixels."""


def _decode_by_pillow(
    content: Path | bytes, channels: int, draft: Callable[[Image.Image], None] | None
) -> Image.Image | np.ndarray:
    source = BytesIO(content) if isinstance(content, bytes) else content
    try:
        with Image.open(source, formats=pillow_formats()) as image:
            bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))
            if image.mode == "I;16" and channels == 1 and image.format == "PNG":
                return arrays.with_channels(arrays.grey16_on_background(arrays.upright(image)))
            if image.mode.startswith(("I", "F")) or max(bits) > 8:
                raise _NotForPillow(f"pixels are not 8 bits (mode {image.mode})")
            if draft is not None and image.format in JPEG:
                draft(image)
            arrays.load(image)
            return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"too large: {error}") from None
    except UnidentifiedImageError:  # its text holds the path, or an address in memory
        raise _NotForPillow("no image of a known format") from None
