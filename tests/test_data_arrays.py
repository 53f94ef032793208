"""Images that are arrays: other numbers of channels and depths, what is refused, pixels without data."""

import importlib.util
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from spark_me.config.data import DataConfig
from spark_me.data import arrays
from spark_me.data.files import find_files
from spark_me.data.reading import Encoded, read_image
from spark_me.data.transforms import display_of, to_displayable
from spark_me.data.unreadable import UnreadableImage
from spark_me.errors import UserError

SCALE = {np.uint8: 255, np.uint16: 65535, np.float32: 1, np.int16: 1}


def pixels(channels: int, dtype: type, shape: tuple[int, int] = (20, 30)) -> np.ndarray:
    values = np.random.default_rng(0).random((*shape, channels))
    return (values * (250 if np.issubdtype(dtype, np.integer) else 1)).astype(dtype)


def expected(array: np.ndarray) -> torch.Tensor:
    """[C, H, W], pixel by pixel."""
    scaled = array.astype(np.float64) / SCALE[array.dtype.type]
    return torch.from_numpy(np.moveaxis(scaled, 2, 0).copy()).float()


@pytest.mark.parametrize("dtype", SCALE)
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_npy(tmp_path: Path, channels: int, dtype: type) -> None:
    array = pixels(channels, dtype)
    np.save(tmp_path / "a.npy", array)
    image = read_image(tmp_path / "a.npy", channels)
    assert isinstance(image, torch.Tensor) and image.dtype == torch.float32
    torch.testing.assert_close(image, expected(array))
    encoded = Encoded("shard/a.npy", (tmp_path / "a.npy").read_bytes())
    assert torch.equal(read_image(encoded, channels), image)


@pytest.mark.parametrize("layout", ["contig", "separate", "pages", "lzw"])
@pytest.mark.parametrize("dtype", SCALE)
@pytest.mark.parametrize("channels", [4, 13])
def test_multi_band_tiff(tmp_path: Path, channels: int, dtype: type, layout: str) -> None:
    array, path = pixels(channels, dtype), tmp_path / "a.TIF"
    if layout == "pages":
        tifffile.imwrite(path, np.moveaxis(array, 2, 0), photometric="minisblack")
    else:
        planar = "contig" if layout == "lzw" else layout
        stored = array if planar == "contig" else np.moveaxis(array, 2, 0)
        compression = "lzw" if layout == "lzw" else None
        tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=planar, compression=compression)
    torch.testing.assert_close(read_image(path, channels), expected(array))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_tiff_of_few_channels_is_not_clipped(tmp_path: Path, channels: int, dtype: type) -> None:
    array = pixels(channels, dtype) * (200 if dtype is np.uint16 else 1)
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", array.squeeze(), photometric=photometric)
    torch.testing.assert_close(read_image(tmp_path / "a.tif", channels), expected(array))


def test_eight_bit_tiff_of_few_channels_stays_an_image(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels(3, np.uint8), photometric="rgb")
    image = read_image(tmp_path / "a.tif", 3)
    assert isinstance(image, Image.Image)
    assert (np.asarray(image) == pixels(3, np.uint8)).all()


def test_png_of_four_channels_and_of_sixteen_bits(tmp_path: Path) -> None:
    array = pixels(4, np.uint8)
    Image.fromarray(array, "RGBA").save(tmp_path / "a.png")
    torch.testing.assert_close(read_image(tmp_path / "a.png", 4), expected(array))
    deep = pixels(1, np.uint16) * 200
    Image.fromarray(deep[..., 0]).save(tmp_path / "b.png")
    torch.testing.assert_close(read_image(tmp_path / "b.png", 1), expected(deep))
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    with pytest.raises(UnreadableImage, match=r"has 3 channels \(mode RGB\), not 4: .* model.in_channels=3"):
        read_image(tmp_path / "c.png", 4)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((4, 20, 30), "looks like C×H×W: store it as H×W×C"),
        ((4, 20, 4), "may be H×W×C or C×H×W"),
        ((20, 30, 5), r"has 5 channels \(shape \(20, 30, 5\)\), not 4: .* model.in_channels=5"),
        ((20, 30), "has 1 channels .* model.in_channels=1"),
        ((2, 20, 30, 4), "not height × width × channels"),
        ((0, 20, 4), "not height × width × channels"),
    ],
)
def test_shape_that_does_not_fit(tmp_path: Path, shape: tuple[int, ...], reason: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype=np.uint8))
    with pytest.raises(UnreadableImage, match=reason):
        read_image(tmp_path / "a.npy", 4)


def npy_header(shape: tuple[int, ...]) -> bytes:
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"text", npy_header((40, 40, 4)), npy_header((10**6, 10**6, 4)), npy_header((4, 10**9))]
)
def test_damaged_npy(content: bytes) -> None:
    with pytest.raises(UnreadableImage):
        read_image(Encoded("a.npy", content), 4)


def test_npy_of_objects_runs_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match="Object arrays cannot be loaded"):
        read_image(tmp_path / "a.npy", 1)


def test_damaged_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels(13, np.float32), photometric="minisblack", planarconfig="contig", compression="zlib")
    whole = path.read_bytes()
    for end in (0, 4, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:end])
        with pytest.raises(UnreadableImage) as caught:
            read_image(path, 13)
        assert "\n" not in str(caught.value)


def test_missing_package_names_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels(4, np.uint8), photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a.tif: with 4 channels it needs tifffile: .*\[multiband\]"):
        find_files(DataConfig(root=str(tmp_path)), 4)
    with pytest.raises(UnreadableImage, match=r"\[multiband\]"):
        read_image(tmp_path / "a.tif", 4)


# Nodata.


def test_a_number_is_nodata_where_all_channels_have_it() -> None:
    array = np.full((2, 2, 3), 7, dtype=np.uint16)
    array[0, 0] = 9
    array[0, 1, 1] = 9
    image = torch.from_numpy(arrays.to_float(array, 9.0))
    assert image.isnan().tolist() == [[[True, False], [False, False]]] * 3
    assert image[1, 0, 1] == np.float32(9 / 65535)


def test_nan_is_nodata_where_any_channel_has_it() -> None:
    array = np.ones((2, 2, 3), dtype=np.float32)
    array[0, 1, 1] = np.nan
    assert (
        torch.from_numpy(arrays.to_float(array, float("nan"))).isnan().tolist() == [[[False, True]] + [[False] * 2]] * 3
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("nodata", [None, -1.0])
def test_values_that_are_not_finite_are_refused(bad: float, nodata: float | None) -> None:
    array = np.ones((2, 2, 4), dtype=np.float32)
    array[0, 0] = bad
    with pytest.raises(UnreadableImage, match="data.nodata=nan"):
        arrays.to_float(array, nodata)


def test_photos_have_nodata_too(tmp_path: Path) -> None:
    array = pixels(3, np.uint8)
    array[3, 4] = 0
    array[5, 6, 0] = 0
    Image.fromarray(array).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 3, 0.0)
    assert isinstance(image, torch.Tensor)
    assert image[:, 3, 4].isnan().all() and not image[:, 5, 6].isnan().any()


def test_any_number_of_channels_can_be_shown() -> None:
    for channels, shown in ((1, 1), (2, 1), (3, 3), (13, 3)):
        data = DataConfig(mean=[300.0] * channels, std=[50.0] * channels)
        images = torch.tensor([0.0, 2.5, -2.5, 9]).view(1, 1, 2, 2).expand(1, channels, 2, 2)
        picture = to_displayable(images, data)
        assert picture.shape[1] == shown
        torch.testing.assert_close(picture[0, 0].flatten(), torch.tensor([0.5, 1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("channels", "mean", "caption"),
    [
        (1, 0.4, ""),
        (3, 0.4, ""),
        (1, 300.0, "grey, within 2.5 deviations of its mean"),
        (3, 300.0, "red, green, blue, within 2.5 deviations of their mean"),
        (2, 0.4, "band 1 of 2 as grey, within 2.5 deviations of its mean"),
        (4, 0.4, "bands 1, 2, 3 of 4 as red, green, blue, within 2.5 deviations of their mean"),
        (13, 300.0, "bands 1, 2, 3 of 13 as red, green, blue, within 2.5 deviations of their mean"),
    ],
)
def test_caption_says_which_bands_are_shown(channels: int, mean: float, caption: str) -> None:
    """And pixels are shown as it says."""
    data = DataConfig(mean=[mean] * channels, std=[0.2] * channels)
    assert display_of(data, channels).caption == caption
    images = torch.randn(1, channels, 4, 5, generator=torch.Generator().manual_seed(0))
    picture = to_displayable(images, data)[0]
    assert len(picture) == (3 if "bands 1, 2, 3" in caption or channels == 3 else 1)
    for band, shown in zip(images[0], picture):
        expected = 0.5 + band / 5 if caption else mean + 0.2 * band
        torch.testing.assert_close(shown, expected.clamp(0, 1))
