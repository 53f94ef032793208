"""Photos as a viewer shows them: upright, and transparent pixels on white."""

import numpy as np
from PIL import Image

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
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data, of which any error may come, says nothing
        return image
    return image if turn is None else image.transpose(turn)


def upright_array(array: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, C] as they were held, for a TIFF's orientation of 1 to 8."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    return array[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


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
