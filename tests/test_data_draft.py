"""JPEGs that are decoded smaller where the random crop allows it: the same crops, nearly the same pixels."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from spark_me.config.data import DataConfig, FinetuneDataConfig
from spark_me.config.tasks import ModelConfig
from spark_me.data import arrays
from spark_me.data.datasets import Reader
from spark_me.data.loaders import labelled_train_reader, train_reader
from spark_me.data.reading import Encoded, UnreadableImage, read_image
from spark_me.data.sampler import CROP, seed_of

SEED = 5
FINE = 64
"""Side of the crops, in pixels, and that of crops for which nothing can be decoded smaller."""
COARSE = 512


def waves(height: int, width: int) -> np.ndarray:
    """Pixels [H, W, 3] that change by up to 6 a pixel, and are unlike themselves however they are turned."""
    y, x = np.mgrid[:height, :width]
    shades = [np.sin(x / 15 + y / 40), np.sin(y / 18), np.cos(x / 30) * np.cos(y / 25 + 1)]
    return (127.5 + 90 * np.stack(shades, axis=-1)).round().astype(np.uint8)


def encode(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[arrays.ORIENTATION] = orientation
    file = BytesIO()
    image.save(file, "JPEG", **{"quality": 95, "subsampling": 0, "exif": exif, **options})
    return file.getvalue()


def reader_of(side: int = FINE, channels: int = 3, **data: object) -> Reader:
    model = ModelConfig(image_size=[side, side], in_channels=channels)
    return train_reader(DataConfig(crop_scale=[0.2, 1.0], **data), model, SEED)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(H, W) of everything that Pillow decoded, as it is stored."""
    sizes = []
    load = arrays.load

    def noted(image: Image.Image) -> None:
        load(image)
        sizes.append((image.height, image.width))

    monkeypatch.setattr(arrays, "load", noted)
    return sizes


def expected_crop(content: bytes, side: int, mode: str, index: int) -> tuple[np.ndarray, int]:
    """The crop of the whole image, and how much smaller it could have been decoded, by Pillow and torchvision alone."""
    whole = ImageOps.exif_transpose(Image.open(BytesIO(content))).convert(mode)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(CROP, SEED, 0, index))
        top, left, height, width = RandomResizedCrop.get_params(whole, [0.2, 1.0], [3 / 4, 4 / 3])
        flip = torch.rand(1) < 0.5
    crop = whole.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
    most = min(height, width) / side
    return np.asarray(ImageOps.mirror(crop) if flip else crop), max(n for n in (1, 2, 4, 8) if n == 1 or n <= most)


def check(content: bytes, channels: int = 3, side: int = FINE, indices: range = range(12)) -> set[int]:
    """Compare crops of an image with those of the whole; how much smaller it was decoded for them."""
    reader, item = reader_of(side, channels), Encoded("a.jpg", content)
    reductions = set()
    for index in indices:
        expected, reduction = expected_crop(content, side, {1: "L", 3: "RGB"}[channels], index)
        crop = reader.crop(item, 0, index).image
        assert crop.dtype == torch.uint8 and crop.shape == (channels, side, side)
        difference = np.abs(crop.numpy().transpose(1, 2, 0).astype(int) - expected.reshape(side, side, -1))
        assert difference.mean() < 1 and difference.max() <= 9 and reduction in (1, 2, 4, 8)
        if reduction == 1:
            assert difference.max() == 0
        reductions.add(reduction)
    return reductions


# Odd sides, whose last pixels are no whole one when decoded smaller.
PHOTO = Image.fromarray(waves(743, 1001))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_are_those_of_the_whole_image(orientation):
    assert check(encode(PHOTO, orientation)) >= {4, 8}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}], ids=str)
def test_every_kind_of_jpeg(mode, options, channels):
    assert check(encode(PHOTO.convert(mode), 6, **options), channels, indices=range(4)) & {4, 8}


def test_the_first_of_several_pictures(decoded):
    file = BytesIO()
    PHOTO.save(file, "MPO", save_all=True, append_images=[Image.new("RGB", PHOTO.size)], quality=95, subsampling=0)
    assert Image.open(file).format == "MPO"
    assert check(file.getvalue(), indices=range(2)) <= {4, 8}
    assert decoded[0] == (93, 126)


def test_decoded_as_small_as_the_crop_allows(decoded):
    content = encode(PHOTO, 6)
    for side in (FINE, 96, 192, 256, COARSE):
        for index in range(8):
            decoded.clear()
            reader_of(side).crop(Encoded("a.jpg", content), 0, index)
            _, reduction = expected_crop(content, side, "RGB", index)
            assert set(decoded) == {(-(-743 // reduction), -(-1001 // reduction))}
    assert set(decoded) == {(743, 1001)}


def test_wholly_decoded_pictures_give_the_same_bytes_as_ever(decoded):
    content = encode(PHOTO, 3)
    crop = reader_of(draft=False).crop(Encoded("a.jpg", content), 0, 2).image
    assert np.array_equal(crop.numpy().transpose(1, 2, 0), expected_crop(content, FINE, "RGB", 2)[0])
    assert check(content, side=COARSE) == {1}
    png = BytesIO()
    PHOTO.save(png, "PNG")
    crop = reader_of().crop(Encoded("a.png", png.getvalue()), 0, 2).image
    assert np.array_equal(crop.numpy().transpose(1, 2, 0), expected_crop(png.getvalue(), FINE, "RGB", 2)[0])
    assert set(decoded) == {(743, 1001)}


def test_nodata_and_other_channels_are_judged_whole(decoded):
    item = Encoded("a.jpg", encode(PHOTO))
    crops = [reader_of(nodata=0.0, draft=draft).crop(item, 0, 1) for draft in (True, False)]
    assert torch.equal(crops[0].image, crops[1].image) and crops[0].valid is not None
    four = Encoded("a.jpg", encode(PHOTO.convert("CMYK")))
    own = {"mean": [0.5] * 4, "std": [0.2] * 4}
    crops = [reader_of(channels=4, draft=draft, **own).crop(four, 0, 1) for draft in (True, False)]
    assert torch.equal(crops[0].image, crops[1].image)
    assert set(decoded) == {(743, 1001)}


def test_sample_depends_on_seed_epoch_and_index_alone():
    reader, item = reader_of(), Encoded("a.jpg", encode(PHOTO))
    before = torch.get_rng_state()
    first = reader.crop(item, 3, 2).image
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    reader.crop(item, 0, 0)
    assert torch.equal(reader.crop(item, 3, 2).image, first)
    assert not torch.equal(reader.crop(item, 4, 2).image, first)


def test_finetuning_draws_the_same_crops_and_caches_whole_pictures(decoded):
    item = Encoded("a.jpg", encode(PHOTO, 8))

    def crops(**data: object) -> torch.Tensor:
        config = FinetuneDataConfig(train_crop=FINE, crop_scale=[0.3, 1.0], erasing=0.5, **data)
        reader = labelled_train_reader(config, 3, SEED)
        return torch.stack([reader.crop(item, 0, index).image for index in range(6)])

    reduced = crops()
    assert set(decoded) <= {(186, 251), (93, 126)}
    decoded.clear()
    whole, cached = crops(draft=False), crops(cache=True)
    assert set(decoded) == {(743, 1001)}
    assert torch.equal(whole, cached)
    assert 0 < (reduced - whole).abs().max() < 9 / 255 / 0.22  # what is erased got the same noise


def test_what_is_unreadable_is_so_for_the_same_reason(monkeypatch):
    def reason(item: Encoded, reader: Reader | None) -> str:
        with pytest.raises(UnreadableImage) as caught:
            read_image(item, 3) if reader is None else reader.crop(item, 0, 0)
        return str(caught.value)

    reader = reader_of()
    for options in ({}, {"progressive": True}):
        content = encode(PHOTO, **options)
        for end in (0, 100, 1000, len(content) // 2, len(content) - 100):
            item = Encoded("a.jpg", content[:end])
            assert reason(item, reader) == reason(item, None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert reason(Encoded("a.jpg", content), reader).startswith("too large: ")
