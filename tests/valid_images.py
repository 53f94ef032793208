"""Small valid images of every format that is read, the same at every run."""

from functools import cache
from io import BytesIO

import numpy as np
import tifffile
from PIL import Image

from spark_me.data.reading import pillow_formats


@cache
def valid_files() -> dict[str, bytes]:
    """Content by a name that ends as such a file's does."""
    files = {**_pillow_files(), **_npy_files(), **_tiff_files()}
    return dict(sorted(files.items()))


def _pillow_files() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    photo = Image.fromarray(noise, "RGBA")
    files = {}
    Image.init()
    for kind in sorted(Image.SAVE):
        if kind not in (*pillow_formats(), "MPO"):
            continue
        for mode in ("RGB", "RGBA", "L", "P", "1", "LA", "CMYK", "I;16", "F"):
            image = Image.fromarray(noise[..., 0].astype(np.uint16) * 200) if mode == "I;16" else photo.convert(mode)
            file = BytesIO()
            try:
                image.save(file, kind)
            except (OSError, KeyError, ValueError):  # is not for this format
                continue
            files[f"{kind}-{mode.replace(';', '')}{_suffix(kind)}"] = file.getvalue()
    for name, options in {"jpeg": {"progressive": True}, "png": {"interlace": True}, "gif": {"save_all": True}}.items():
        file = BytesIO()
        photo.convert("RGB").save(file, name, **options)
        files[f"other.{name}"] = file.getvalue()
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4", "tiff_ccitt", "webp", "zstd"):
        file = BytesIO()
        image = photo.convert("1" if compression in ("group4", "tiff_ccitt") else "RGB")
        try:
            image.save(file, "TIFF", compression=compression)
        except (OSError, RuntimeError, KeyError):  # libtiff is built without it
            continue
        files[f"pillow-{compression}.tif"] = file.getvalue()
    return files


def _suffix(kind: str) -> str:
    return next((suffix for suffix, name in sorted(Image.registered_extensions().items()) if name == kind), "")


def _npy_files() -> dict[str, bytes]:
    array = np.random.default_rng(0).random((9, 8, 3))
    files = {}
    for version in ((1, 0), (2, 0), (3, 0)):
        for dtype in (np.uint8, np.uint16, np.float32, np.float64):
            file = BytesIO()
            np.lib.format.write_array(file, (array * 100).astype(dtype), version)
            files[f"{version[0]}-{np.dtype(dtype)}.npy"] = file.getvalue()
    return files


def _tiff_files() -> dict[str, bytes]:
    array = np.random.default_rng(0).random((16, 16, 5))
    files = {}
    for compression in (
        None,
        "zlib",
        "lzw",
        "jpeg2000",
        "packbits",
        "lzma",
        "zstd",
        "webp",
        "lerc",
        "jpegxl",
        "jpegxr",
    ):
        for layout in ("contig", "separate", "tiled", "big"):
            bands = array[..., :3] if compression in ("webp", "jpegxr") else array
            bands = (bands * 60000).astype(np.uint8 if compression in ("webp", "jpegxr") else np.uint16)
            file = BytesIO()
            try:
                tifffile.imwrite(
                    file,
                    np.moveaxis(bands, 2, 0) if layout == "separate" else bands,
                    photometric="minisblack" if bands.shape[2] == 5 else "rgb",
                    planarconfig="separate" if layout == "separate" else "contig",
                    compression=compression,
                    tile=(16, 16) if layout == "tiled" else None,
                    bigtiff=layout == "big",
                )
            except Exception:  # imagecodecs is built without it, or it does not take such bands
                continue
            files[f"{compression}-{layout}.tif"] = file.getvalue()
    return files
