"""Reading one image: what is no image, damaged or dangerously large becomes a reason, not a crash."""

import struct
import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from spark_me.data import arrays
from spark_me.data.unreadable import UnreadableImage

MODES = {1: "L", 3: "RGB"}
EXTENSIONS = (*IMG_EXTENSIONS, ".npy")
"""Of files that are taken for images, in lower case."""
TIFF = (".tif", ".tiff")
BITS_PER_SAMPLE = 258
"""A TIFF's tag."""


class Encoded(NamedTuple):
    """An image that is no file of its own."""

    name: str
    """Where it comes from; its end says what it is, as a file's does."""
    content: bytes | np.ndarray
    """What a file would hold, or pixels [H, W, C]."""

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
    """Convert a decoded image to what training sees.

    Raises:
        UnreadableImage: if it has other channels, or pixels that are not finite.
    """
    if isinstance(decoded, Image.Image):
        if channels not in MODES and len(decoded.getbands()) != channels:
            bands = len(decoded.getbands())
            raise UnreadableImage(arrays.other_channels(bands, channels, f" (mode {decoded.mode})"))
        if channels in MODES:
            decoded = _convert(decoded, MODES[channels])
            if nodata is None:
                return decoded
        decoded = arrays.with_channels(np.asarray(decoded))
    return torch.from_numpy(arrays.to_float(decoded, nodata))


def decode(item: Item, channels: int) -> Image.Image | np.ndarray:
    """Decode an image as it is stored: whatever Pillow reads in 8 bits, else an array [H, W, C].

    Raises:
        UnreadableImage: as `read_image`.
    """
    content = item.content if isinstance(item, Encoded) else item
    if isinstance(content, np.ndarray):
        return arrays.check(content, channels)
    name = str(item).lower()
    if name.endswith(".npy"):
        return arrays.read_npy(content, channels)
    if name.endswith(TIFF) and channels not in MODES:
        return arrays.read_tiff(content, channels)
    try:
        return _decode_by_pillow(content, channels)
    except _NotForPillow as reason:
        if name.endswith(TIFF):
            return arrays.read_tiff(content, channels)
        raise UnreadableImage(str(reason)) from None


def _convert(image: Image.Image, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except ValueError as error:  # from some rare modes there is no way
        raise UnreadableImage(str(error)) from None


class _NotForPillow(Exception):
    """Pillow does not know the format, or would clip or truncate the pixels."""


def _decode_by_pillow(content: Path | bytes, channels: int) -> Image.Image | np.ndarray:
    try:
        with warnings.catch_warnings():
            # Between one and two times its limit Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
                bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))
                if image.mode == "I;16" and channels == 1 and image.format == "PNG":
                    return arrays.with_channels(np.asarray(image))
                if image.mode.startswith(("I", "F")) or max(bits) > 8:
                    raise _NotForPillow(f"pixels are not 8 bits (mode {image.mode})")
                image.load()
                return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"too large: {error}") from None
    except UnidentifiedImageError:  # its text holds the path, or an address in memory
        raise _NotForPillow("no image of a known format") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error) as error:
        # What Pillow's decoders raise.
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None
