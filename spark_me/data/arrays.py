"""Images as arrays of pixels: photos as a viewer shows them; files of more than 8 bits or other numbers of channels."""

import importlib.util
import logging
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from spark_me.data.unreadable import UnreadableImage
from spark_me.errors import install_text

BACKGROUND = (255, 255, 255, 255)
"""White: what shows through transparent pixels. Whatever colour is stored in them was never meant to be seen."""
TRANSPARENT_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
KEYED_MODES = ("P", "RGB", "L", "1")
"""Of which a colour, or entries of the palette, may be declared transparent."""
ORIENTATION = 0x0112
"""The tag of EXIF and of TIFF."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of each orientation upright."""
TURNED, FROM_BELOW, FROM_THE_RIGHT = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)
"""Orientations by which rows become columns; of which, then, rows or columns are reversed."""


KEY_SCALES = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
"""How Pillow scales the pixels, but not the transparent colour, of PNGs with other than 8 bits."""


def load(image: Image.Image) -> None:
    """Decode an image that was opened, so that its transparent colour fits its pixels."""
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # what is still to be decoded, and from which layout of bits
    scale = KEY_SCALES.get(str(tiles[0][3])) if tiles and image.format == "PNG" else None
    image.load()
    if scale is not None and key is not None:
        keys = [int(value * scale) for value in (key if isinstance(key, tuple) else (key,))]
        image.info["transparency"] = tuple(keys) if isinstance(key, tuple) else keys[0]


def upright(image: Image.Image) -> Image.Image:
    """The image as it was held: phones store the sensor's rows, and how to turn them.

    Pillow itself turns TIFF and AVIF, and then reports no orientation.
    """
    turn = TURNS.get(orientation_of(image))
    return image if turn is None else image.transpose(turn)


def orientation_of(image: Image.Image) -> int:
    """1 to 8; 1 is upright."""
    try:
        orientation: int = image.getexif().get(ORIENTATION, 1)
        return orientation if orientation in TURNS else 1
    except Exception:  # damaged EXIF data, of which any error may come, says nothing
        return 1


def upright_array(array: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, C] as they were held, for a TIFF's orientation of 1 to 8."""
    if orientation in TURNED:
        array = array.swapaxes(0, 1)
    return array[:: -1 if orientation in FROM_BELOW else 1, :: -1 if orientation in FROM_THE_RIGHT else 1]


def on_background(image: Image.Image, mode: str) -> Image.Image:
    """Convert to RGB or grey, transparent pixels shown on `BACKGROUND`.

    Args:
        image: of any mode, loaded.
        mode: RGB or L.
    """
    if not _has_transparency(image):
        return image.convert(mode)
    pixels = straight(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, BACKGROUND), pixels).convert(mode)


def straight(image: Image.Image) -> Image.Image:
    """The image with colours that are not multiplied by alpha: from others Pillow converts to few modes."""
    mode = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    return image if mode is None else image.convert(mode)


def grey16_on_background(image: Image.Image) -> np.ndarray:
    """Pixels uint16 [H, W] of a PNG of 16 bits, its transparent value shown as white."""
    pixels = np.asarray(image)
    key = image.info.get("transparency")
    return pixels if key is None else np.where(pixels == key, np.uint16(65535), pixels)


def _has_transparency(image: Image.Image) -> bool:
    if image.mode in TRANSPARENT_MODES:
        return True
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    return image.mode in KEYED_MODES and ("transparency" in image.info or palette.endswith("A"))


if TYPE_CHECKING:
    import tifffile

NEEDS_TIFFFILE = f"needs tifffile: {install_text('multiband')}"
LARGEST = 1e30
"""Beyond it lie no measurements: resizing and normalising, with the usual deviations, would make infinity of them."""
LARGEST_ARRAY = 1 << 30
"""Bytes that an image takes when it is decoded; a few times as many are needed to crop it."""
LARGEST_TILE = 64 << 20
"""Bytes; a tile may be larger than the image that it is all of."""
MOST_PAGES = 10_000
WITH_OWN_SIZE = {6, 7, 22610, 33003, 33004, 33005, 33007, 34712, 34887, 34892, 34933, 34934, 50001, 50002, 52546}
"""Compressions of TIFF whose tiles and strips are images, which may be larger than the TIFF says that they are: JPEG,
JPEG 2000, JPEG XR, JPEG XL, PNG, WebP and LERC. tifffile stops all others where the tile is full."""
SEGMENT_FORMATS = ("JPEG", "JPEG2000", "PNG", "WEBP")
"""Those of which Pillow tells the size."""
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
        shape, _, dtype = read_header(file)
        if not dtype.hasobject:  # those numpy refuses itself
            check_shape(shape, dtype, channels)  # before memory is asked for
            start = file.tell()
            held, claimed = file.seek(0, os.SEEK_END) - start, math.prod(shape) * dtype.itemsize
            if held < claimed:
                raise UnreadableImage(f"is cut off: {held} of {claimed} bytes")
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
    return with_channels(array)


def read_tiff(content: Path | bytes, channels: int) -> np.ndarray:
    """Pixels [H, W, C] of a TIFF's first image; its bands may be interleaved, planes or pages.

    Raises:
        UnreadableImage: if it is too large or of another shape, or the package that reads it is missing.
        Exception: any, if it is damaged.
    """
    if not has_tifffile():
        raise UnreadableImage(NEEDS_TIFFFILE)
    import tifffile

    source = BytesIO(content) if isinstance(content, bytes) else content
    with _silent_tifffile(), tifffile.TiffFile(source, _multifile=False) as file:
        _require_end(file)
        series = file.series[0]
        axes, shape = series.axes, series.shape
        others = [place for place, (axis, length) in enumerate(zip(axes, shape)) if axis not in "YX" and length > 1]
        if "Y" not in axes or "X" not in axes or len(others) > 1:
            raise UnreadableImage(f"is no image of height, width and channels, but has the axes {axes} {shape}")
        order = [axes.index("Y"), axes.index("X"), *others]
        check_shape(tuple(shape[place] for place in order), series.dtype, channels)
        _require_segments_as_small(file, series)
        # Images are read in processes of their own already.
        array = series.asarray(maxworkers=1)
        orientation = series.keyframe.tags.get(ORIENTATION)
    singletons = tuple(place for place in range(array.ndim) if place not in order)
    pixels = array.transpose([*order, *singletons]).reshape([array.shape[place] for place in order])
    pixels = check(pixels, channels)  # damaged files decode to less than they claim
    return pixels if orientation is None else upright_array(pixels, orientation.value)


def _require_end(file: "tifffile.TiffFile") -> None:
    """Go through the chain of a TIFF's pages, which tifffile follows for ever where a damaged one leads back.

    Raises:
        UnreadableImage: if it does, or there are too many pages.
    """
    seen: set[int] = set()
    layout, handle = file.tiff, file.filehandle
    place = layout.offsetsize  # behind the mark of the format
    # A chain that leads out of the file ends there.
    while page := _number_at(handle, place, layout.offsetformat):
        if page in seen or len(seen) == MOST_PAGES:
            raise UnreadableImage("its pages lead in a circle" if page in seen else f"more than {MOST_PAGES} pages")
        seen.add(page)
        place = page + layout.tagnosize + _number_at(handle, page, layout.tagnoformat) * layout.tagsize


def _number_at(handle: "tifffile.FileHandle", place: int, form: str) -> int:
    """A number of a struct's format; 0 beyond the end."""
    handle.seek(place)
    content = handle.read(struct.calcsize(form))
    return int(struct.unpack(form, content)[0]) if len(content) == struct.calcsize(form) else 0


def _require_segments_as_small(file: "tifffile.TiffFile", series: "tifffile.TiffPageSeries") -> None:
    """Refuse tiles and strips that would take more memory than the whole image may.

    Raises:
        UnreadableImage: if they are larger, or their size is not known before they are decoded.
    """
    from tifffile import COMPRESSION

    keyframe = series.keyframe
    if keyframe.is_tiled:
        _require_memory(keyframe.chunks, series.dtype, max(series.nbytes, LARGEST_TILE))
        height, width = keyframe.tilelength, keyframe.tilewidth
    else:
        height, width = min(keyframe.rowsperstrip, keyframe.imagelength), keyframe.imagewidth
    for page in series.pages:
        if page is None:
            raise UnreadableImage("a part of it is in another file, or missing")
        if keyframe.compression in WITH_OWN_SIZE:
            for offset, size in zip(page.dataoffsets, page.databytecounts):
                file.filehandle.seek(offset)
                _require_size(file.filehandle.read(size), height, width, COMPRESSION(keyframe.compression).name)


def _require_size(segment: bytes, height: int, width: int, compression: str) -> None:
    try:
        with Image.open(BytesIO(segment), formats=SEGMENT_FORMATS) as image:
            # Encoders may fill up blocks.
            if image.height * image.width > (height + 32) * (width + 32):
                raise UnreadableImage(
                    f"its tiles of {height}×{width} pixels hold images of {image.height}×{image.width}"
                )
    except UnidentifiedImageError:
        raise UnreadableImage(
            f"is compressed by {compression}, which does not tell how large it will be: store it with deflate, LZW or "
            "Zstandard"
        ) from None


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
        UnreadableImage: as `check_shape`.
    """
    check_shape(array.shape, array.dtype, channels)
    return with_channels(array)


def check_shape(shape: tuple[int, ...], dtype: np.dtype, channels: int) -> None:
    """Make sure that an array would be an image [H, W, C] or [H, W] of so many channels, before it is decoded.

    Raises:
        UnreadableImage: if it is too large or of another shape, or if it cannot be told which axis are the channels.
    """
    if dtype.kind not in "uif":
        raise UnreadableImage(f"has values of type {dtype}, not numbers")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise UnreadableImage(f"has the shape {shape}, not height × width × channels")
    _require_reasonable(shape)
    shape = shape if len(shape) == 3 else (*shape, 1)
    if shape[0] == channels > 1 and shape[2] == channels:
        raise UnreadableImage(f"has the shape {shape}, which may be H×W×C or C×H×W")
    if shape[2] != channels:
        if shape[0] == channels:
            raise UnreadableImage(f"has the shape {shape}, which looks like C×H×W: store it as H×W×C")
        raise UnreadableImage(other_channels(shape[2], channels, f" (shape {shape})"))
    _require_memory(shape, dtype, LARGEST_ARRAY)


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


def _require_memory(shape: tuple[int, ...], dtype: np.dtype, most: int) -> None:
    size = math.prod(shape) * dtype.itemsize
    if size > most:
        raise UnreadableImage(
            f"too large: {'×'.join(map(str, shape))} values of {dtype} take {size / 2**20:,.0f} MiB, and the limit is "
            f"{most / 2**20:,.0f} MiB: cut it into tiles"
        )
