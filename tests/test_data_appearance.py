"""Photos as a viewer shows them, in every reader: upright, and transparent pixels on white."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps, features
from tar_shards import write_shard

from spark_me.config.data import DataConfig
from spark_me.data.arrays import on_background, upright_array
from spark_me.data.commands import examine, measure
from spark_me.data.datasets import HeldOutDataset, Reader
from spark_me.data.files import find_files
from spark_me.data.reading import Encoded, Item, read_image
from spark_me.data.transforms import held_out_transform
from spark_me.downstream.preprocessing import recipe_preprocessing

# What each orientation of EXIF 2.32 means: which corner row 0 and column 0 of the stored pixels belong to.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda seen: seen,
    2: np.fliplr,
    3: lambda seen: np.rot90(seen, 2),
    4: np.flipud,
    5: lambda seen: np.swapaxes(seen, 0, 1),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: np.swapaxes(np.rot90(seen, 2), 0, 1),
    8: lambda seen: np.rot90(seen, -1),
}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image, kind: str, orientation: int | None = None, **options: object) -> bytes:
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Upright.


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF", "MPO"])
def test_photos_are_upright(kind: str, orientation: int) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow is built without {kind}")
    # Four flat quarters, which lossy formats keep nearly.
    seen = np.kron(np.array([[0, 90], [170, 255]], dtype=np.uint8), np.ones((16, 24), dtype=np.uint8))
    stored = np.ascontiguousarray(STORED[orientation](seen))
    content = encode(Image.fromarray(stored).convert("RGB"), kind, orientation, quality=95)
    for channels in (1, 3):
        found = np.asarray(read_image(Encoded("a", content), channels)).astype(int)
        assert np.abs(found.reshape(*seen.shape, -1) - seen[..., None]).max() < 12


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_counts_for_other_channels_and_depths(tmp_path: Path, orientation: int) -> None:
    four, deep = noise(6, 9, 4), noise(6, 9).astype(np.uint16) * 250
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](four)), "RGBA")
    found = read_image(Encoded("a.png", encode(stored, "PNG", orientation)), 4)
    np.testing.assert_allclose(found.numpy().transpose(1, 2, 0), four / 255, rtol=1e-6)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](deep)))
    found = read_image(Encoded("a.png", encode(stored, "PNG", orientation)), 1)
    np.testing.assert_allclose(found.numpy()[0], deep / 65535, rtol=1e-6)
    bands = noise(6, 9, 7)
    tags = [(274, "H", 1, orientation, True)]
    stored = np.ascontiguousarray(STORED[orientation](bands))
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig="contig", extratags=tags)
    found = read_image(tmp_path / "a.tif", 7)
    np.testing.assert_allclose(found.numpy().transpose(1, 2, 0), bands / 255, rtol=1e-6)
    assert np.array_equal(upright_array(stored, orientation), bands)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"no exif", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff"]
)
def test_damaged_exif_data_says_nothing(exif: bytes) -> None:
    content = encode(Image.fromarray(noise(8, 9, 3)), "PNG", None, exif=exif)
    assert np.array_equal(np.asarray(read_image(Encoded("a.png", content), 3)), noise(8, 9, 3))


def test_orientation_that_is_none_is_ignored() -> None:
    for orientation in (0, 9, 65535):
        content = encode(Image.fromarray(noise(8, 9, 3)), "PNG", orientation)
        assert read_image(Encoded("a.png", content), 3).size == (9, 8)


# Transparent.


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return pixels * share + 255 * (1 - share)


def rgba() -> np.ndarray:
    pixels = noise(16, 18, 4)
    pixels[..., 3] = np.random.default_rng(1).choice([0, 1, 100, 254, 255], (16, 18))
    return pixels


def grey_of(rgb: np.ndarray) -> np.ndarray:
    return rgb @ [0.299, 0.587, 0.114]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TGA", "DDS", "ICO"])
def test_alpha_is_shown_on_white(kind: str) -> None:
    pixels = rgba() if kind != "ICO" else np.ascontiguousarray(rgba()[:16, :16])
    content = encode(Image.fromarray(pixels, "RGBA"), kind)
    expected = on_white(pixels[..., :3], pixels[..., 3])
    found = np.asarray(read_image(Encoded("a.ico" if kind == "ICO" else "a", content), 3))
    assert np.abs(found - expected).max() <= 1
    found = np.asarray(read_image(Encoded("a", content), 1))
    assert np.abs(found - grey_of(expected)).max() <= 2
    kept = read_image(Encoded("a", content), 4)  # asked for as it is
    np.testing.assert_allclose(kept.numpy().transpose(1, 2, 0), pixels / 255, rtol=1e-6)


def test_opaque_pixels_keep_every_bit() -> None:
    pixels = noise(40, 50, 4)
    pixels[..., 3] = 255
    assert np.array_equal(np.asarray(on_background(Image.fromarray(pixels, "RGBA"), "RGB")), pixels[..., :3])


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBa", "La"])
def test_other_modes_with_alpha(mode: str) -> None:
    pixels = rgba()
    pixels[..., :3] = pixels[..., :1]
    image = Image.fromarray(pixels, "RGBA")
    image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    found = np.asarray(recipe_picture(image, 3)).astype(int)
    expected = on_white(pixels[..., :3], pixels[..., 3])
    assert np.abs(found - expected).max() <= 2
    if mode == "LA":
        assert np.abs(np.asarray(read_image(Encoded("a", encode(image, "PNG")), 1)) - expected[..., 0]).max() <= 1


def recipe_picture(image: Image.Image, channels: int) -> Image.Image:
    picture = recipe_preprocessing(channels, resnet=True)._picture(image)
    assert isinstance(picture, Image.Image)
    return picture


@pytest.mark.parametrize("transparency", [3, bytes([0, 255, 128, 0])])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_with_transparency(kind: str, transparency: int | bytes) -> None:
    if kind == "GIF" and isinstance(transparency, bytes):
        pytest.skip("GIF has one transparent colour")
    entries = noise(16, 3)
    image = Image.fromarray(noise(16, 18) % 16, "P")
    image.putpalette(entries.tobytes())
    indices = np.asarray(image)
    alpha = np.full(16, 255)
    if isinstance(transparency, bytes):
        alpha[:4] = list(transparency)
    else:
        alpha[transparency] = 0
    content = encode(image, kind, transparency=transparency)
    found = np.asarray(read_image(Encoded("a", content), 3))
    assert np.abs(found - on_white(entries[indices], alpha[indices])).max() <= 1


def png_with_key(colours: int, bits: int, rows: np.ndarray, key: list[int]) -> bytes:
    """A PNG whose pixels are packed by hand, with the transparent colour `key`."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = rows.shape[:2]
    packed = b""
    for row in rows.reshape(height, -1):
        text = "".join(f"{value:0{bits}b}" for value in row)
        packed += b"\0" + int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    trns = struct.pack(f">{len(key)}H", *key)
    parts = [(b"IHDR", header), (b"tRNS", trns), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("key", [0, 1])
def test_grey_png_with_a_transparent_value(bits: int, key: int) -> None:
    rows = np.random.default_rng(0).integers(0, min(2**bits, 4), (7, 9))
    expected = np.where(rows == key, 1, rows / (2**bits - 1))
    found = read_image(Encoded("a.png", png_with_key(0, bits, rows, [key])), 1)
    values = np.asarray(found) / 255 if isinstance(found, Image.Image) else found[0].numpy()
    np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_colour_png_with_a_transparent_colour(bits: int) -> None:
    scale = 2 ** (bits - 8)
    rows = noise(7, 9, 3).astype(int) * scale
    rows[2, 3] = rows[4, 4]
    key = rows[4, 4].tolist()
    expected = np.where((rows == key).all(axis=2, keepdims=True), 255, rows // scale)
    assert np.array_equal(np.asarray(read_image(Encoded("a.png", png_with_key(2, bits, rows, key)), 3)), expected)


def test_nodata_is_judged_by_what_is_stored() -> None:
    pixels = rgba()
    pixels[2, 3] = 0, 0, 0, 0
    image = read_image(Encoded("a.png", encode(Image.fromarray(pixels, "RGBA"), "PNG")), 3, 0.0)
    assert image[:, 2, 3].isnan().all() and image.isnan().sum() == 3
    expected = on_white(pixels[..., :3], pixels[..., 3]) / 255
    expected[2, 3] = np.nan
    np.testing.assert_allclose(image.numpy().transpose(1, 2, 0), expected, atol=1.01 / 255)


# Every reader.


def test_every_reader_sees_the_same(tmp_path: Path) -> None:
    """A portrait of a phone with transparent pixels: files, lists, shards, rows, predictions, statistics."""
    import datasets

    seen = rgba()
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](seen)), "RGBA")
    content = encode(stored, "PNG", 6)
    (tmp_path / "class" / "x").mkdir(parents=True)
    path = tmp_path / "class" / "x" / "a.png"
    path.write_bytes(content)
    (tmp_path / "list.txt").write_text("class/x/a.png\n")
    write_shard(tmp_path / "a.tar", {"a.png": content})
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": content, "path": None}]}, features=datasets.Features({"image": datasets.Image()})
    )
    rows.save_to_disk(tmp_path / "saved")
    expected = on_white(seen[..., :3], seen[..., 3])
    items: list[Item] = []
    for kind, root in {
        "images": "class",
        "imagefolder": "class",
        "list": "list.txt",
        "webdataset": "a.tar",
        "huggingface": "saved",
    }.items():
        items.append(next(iter(find_files(DataConfig(kind=kind, root=str(tmp_path / root))).train)))
    for item in items:
        assert np.abs(np.asarray(read_image(item, 3)) - expected).max() <= 1
        moments = measure(item, 3, None)
        assert moments is not None
        np.testing.assert_allclose(moments.mean, expected.mean(axis=(0, 1)) / 255, atol=1 / 255)
        assert examine(item, 3, DataConfig())[2:] == (16, 18, "RGBA")
    preprocessing = recipe_preprocessing(3, resnet=True)
    shown = [
        preprocessing.read(path),
        preprocessing.prepare(str(path)),
        preprocessing.prepare(content),
        preprocessing.prepare(Image.open(path)),
    ]
    plain = preprocessing.prepare(np.asarray(read_image(path, 3)))
    assert all((other == plain).all() for other in shown)
    assert (preprocessing.prepare(ImageOps.exif_transpose(Image.open(path))) == plain).all()
    data = DataConfig()
    crop = HeldOutDataset(items[:1], Reader(held_out_transform(data, (32, 32)), seed=0))[0].image
    flat = HeldOutDataset([Encoded("flat", np.asarray(read_image(path, 3)))], Reader(_plain(data), seed=0))[0].image
    assert crop is not None and flat is not None and (crop - flat).abs().max() < 0.05


def _plain(data: DataConfig) -> Callable:
    transform = held_out_transform(data, (32, 32))
    return lambda tensor: transform(Image.fromarray((tensor.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)))
