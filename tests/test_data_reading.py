"""Reading image files: modes, and everything that is no usable image."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spark_me.data.reading import UnreadableImage, read_image


def noise(mode: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    channels = len(mode)
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_come_out_as_asked(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / "image.png"
    noise(mode).save(path)
    image = read_image(path, channels)
    assert len(image.getbands()) == channels
    assert image.size == (40, 30)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = noise("L")
    grey.save(tmp_path / "image.png")
    pixels = np.asarray(read_image(tmp_path / "image.png", 3))
    assert (pixels == np.asarray(grey)[..., None]).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp", ".gif"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    noise("RGB", (200, 200)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImage):
        read_image(path, 3)


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + b"\0" * 50])
def test_no_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage):
        read_image(path, 3)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UnreadableImage):
            read_image(path, 3)


@pytest.mark.parametrize("times_the_limit", [1.5, 3.0])
def test_decompression_bomb(tmp_path: Path, times_the_limit: float) -> None:
    side = int((Image.MAX_IMAGE_PIXELS * times_the_limit) ** 0.5)
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    with pytest.raises(UnreadableImage, match="too large"):
        read_image(tmp_path / "bomb.png", 3)


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UnreadableImage, match="not 8 bits"):
        read_image(tmp_path / "deep.png", 3)
