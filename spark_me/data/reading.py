"""Reading one image file: what is no image, damaged or dangerously large becomes a reason, not a crash."""

import warnings
from pathlib import Path

from PIL import Image

MODES = {1: "L", 3: "RGB"}


class UnreadableImage(Exception):
    """A file that cannot be used, with the reason."""


def read_image(path: Path, channels: int) -> Image.Image:
    """Decode a file wholly, as RGB (channels 3) or grey (1).

    Raises:
        UnreadableImage: for a file that is missing, no image, truncated, above Pillow's limit of pixels, or not 8 bits.
    """
    try:
        with warnings.catch_warnings():
            # Between one and two times its limit Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise UnreadableImage(f"pixels are not 8 bits (mode {image.mode})")
                return image.convert(MODES[channels])
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"too large: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:  # what Pillow's decoders raise
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None
