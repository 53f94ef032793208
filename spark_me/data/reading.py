"""Reading one image: what is no image, damaged or dangerously large becomes a reason, not a crash."""

import stat
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from spark_me.data import appearance, arrays
from spark_me.data.formats import NPY, TIFF, pillow_formats
from spark_me.data.unreadable import UnreadableImage, unreadable_if_it_fails

MODES = {1: "L", 3: "RGB"}
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
        appearance.load(decoded)  # which one that was handed over may still need
        if min(decoded.size) < 1:
            raise UnreadableImage(f"has no pixels (height×width {decoded.height}×{decoded.width})")
        decoded = appearance.upright(decoded)
        if channels not in MODES:
            return _to_tensor(decoded, nodata)
        shown = appearance.on_background(decoded, MODES[channels])
        if nodata is None:
            return shown
        return _to_tensor(shown, nodata, appearance.straight(decoded).convert(MODES[channels]))
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


def _decode(item: Item, channels: int) -> Image.Image | np.ndarray:
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
        return _decode_by_pillow(content, channels)
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


def _decode_by_pillow(content: Path | bytes, channels: int) -> Image.Image | np.ndarray:
    source = BytesIO(content) if isinstance(content, bytes) else content
    try:
        with Image.open(source, formats=pillow_formats()) as image:
            bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))
            if image.mode == "I;16" and channels == 1 and image.format == "PNG":
                return arrays.with_channels(appearance.grey16_on_background(appearance.upright(image)))
            if image.mode.startswith(("I", "F")) or max(bits) > 8:
                raise _NotForPillow(f"pixels are not 8 bits (mode {image.mode})")
            appearance.load(image)
            return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"too large: {error}") from None
    except UnidentifiedImageError:  # its text holds the path, or an address in memory
        raise _NotForPillow("no image of a known format") from None
