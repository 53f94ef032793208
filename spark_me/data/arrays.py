"""Images that are arrays: more than 8 bits, other numbers of channels, pixels without data."""

import importlib.util
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from spark_me.data.appearance import ORIENTATION, upright_array
from spark_me.data.unreadable import UnreadableImage
from spark_me.errors import install_text

NEEDS_TIFFFILE = f"needs tifffile: {install_text('multiband')}"
LARGEST = 1e30
"""Beyond it lie no measurements: resizing and normalising, with the usual deviations, would make infinity of them."""
FULL_SCALE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
"""What a value of 1 is stored as; other types are taken as they are."""


def has_tifffile() -> bool:
    """Whether multi-band TIFFs can be read."""
    return importlib.util.find_spec("tifffile") is not None


def read_npy(content: Path | bytes, channels: int) -> np.ndarray:
    """Pixels of a .npy file, [H, W, C] or [H, W].

    Raises:
        UnreadableImage: if it is too large, or of another shape.
        Exception: any, if it is damaged.
    """
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        _require_reasonable(read_header(file)[0])  # before memory is asked for
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
    return check(array, channels)


def read_tiff(content: Path | bytes, channels: int) -> np.ndarray:
    """Pixels [H, W, C] of a TIFF's first image; its bands may be interleaved, planes or pages.

    Raises:
        UnreadableImage: if it is too large or of another shape, or the package that reads it is missing.
        Exception: any, if it is damaged.
    """
    if not has_tifffile():
        raise UnreadableImage(NEEDS_TIFFFILE)
    import tifffile

    with _silent_tifffile(), tifffile.TiffFile(BytesIO(content) if isinstance(content, bytes) else content) as file:
        series = file.series[0]
        _require_reasonable(series.shape)
        array, axes = series.asarray(), series.axes
        orientation = series.keyframe.tags.get(ORIENTATION)
    others = [place for place, (axis, length) in enumerate(zip(axes, array.shape)) if axis not in "YX" and length > 1]
    if "Y" not in axes or "X" not in axes or len(others) > 1:
        raise UnreadableImage(f"is no image of height, width and channels, but has the axes {axes} {array.shape}")
    order = [axes.index("Y"), axes.index("X"), *others]
    singletons = tuple(place for place in range(array.ndim) if place not in order)
    pixels = array.transpose([*order, *singletons]).reshape([array.shape[place] for place in order])
    pixels = check(pixels, channels)
    return pixels if orientation is None else upright_array(pixels, orientation.value)


@contextmanager
def _silent_tifffile() -> Iterator[None]:
    # Of damaged files it logs tracebacks that do not name them. What it raises is what counts.
    logger = logging.getLogger("tifffile")
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was


def check(array: np.ndarray, channels: int) -> np.ndarray:
    """The array as [H, W, C], if it is an image of so many channels.

    Raises:
        UnreadableImage: if it is not, or if it cannot be told which axis are the channels.
    """
    if array.dtype.kind not in "uif":
        raise UnreadableImage(f"has values of type {array.dtype}, not numbers")
    if array.ndim not in (2, 3) or array.size == 0:
        raise UnreadableImage(f"has the shape {array.shape}, not height × width × channels")
    array = with_channels(array)
    _require_reasonable(array.shape)
    if array.shape[0] == channels > 1 and array.shape[2] == channels:
        raise UnreadableImage(f"has the shape {array.shape}, which may be H×W×C or C×H×W")
    if array.shape[2] != channels:
        if array.shape[0] == channels:
            raise UnreadableImage(f"has the shape {array.shape}, which looks like C×H×W: store it as H×W×C")
        raise UnreadableImage(other_channels(array.shape[2], channels, f" (shape {array.shape})"))
    return array


def other_channels(found: int, channels: int, how: str) -> str:
    """The reason why an image has too few or too many channels, with what to do."""
    return f"has {found} channels{how}, not {channels}: for such images train with model.in_channels={found}"


def with_channels(array: np.ndarray) -> np.ndarray:
    """[H, W] → [H, W, 1]."""
    return array[..., None] if array.ndim == 2 else array


def to_float(array: np.ndarray, nodata: float | None, stored: np.ndarray | None = None) -> np.ndarray:
    """Scale pixels [H, W, C] to float32 [C, H, W]: uint8 and uint16 to 0 to 1, others as they are.

    Args:
        array: as it is shown.
        nodata: the stored value of pixels without data, which become NaN in all channels.
        stored: the same as it is stored, where transparent pixels are shown in another colour.

    Raises:
        UnreadableImage: if a pixel with data is not finite, or so large that computing with it would overflow.
    """
    without_data = np.zeros(array.shape[:2], dtype=bool)
    if nodata is not None:
        # NaN is never measured, so one is enough; a number may well be, so all channels must have it.
        stored = array if stored is None else stored
        without_data = np.isnan(stored).any(axis=2) if math.isnan(nodata) else (stored == nodata).all(axis=2)
    with_data = array if nodata is None else array[~without_data]
    if with_data.dtype.kind == "f" and with_data.size:
        _require_moderate(with_data)
    with np.errstate(over="ignore", invalid="ignore"):  # of pixels without data
        scaled = array.astype(np.float32) / np.float32(FULL_SCALE.get(array.dtype, 1))
    scaled[without_data] = np.nan
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def _require_moderate(values: np.ndarray) -> None:
    lowest, highest = float(values.min()), float(values.max())
    if not math.isfinite(lowest + highest):
        raise UnreadableImage("has NaN or infinite pixels: if they mean no data, set data.nodata=nan")
    if max(-lowest, highest) > LARGEST:
        value = lowest if -lowest > highest else highest
        raise UnreadableImage(
            f"has pixels of {value:.3g}, too large to compute with: if they mean no data, set data.nodata={value!r}"
        )


def _require_reasonable(shape: tuple[int, ...]) -> None:
    # Of three axes, the shortest is the channels'.
    pixels = math.prod(sorted(shape)[-2:])
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise UnreadableImage(f"too large: {pixels} pixels, above Pillow's limit of {limit}")
