"""Which files are images: the formats that the installed Pillow opens as pictures, and .npy."""

import os
from functools import cache

from PIL import Image, ImageFile, features

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
