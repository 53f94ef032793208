"""Samples: reproducible whatever loads them, and unreadable files that travel as records."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark_me.config.data import DataConfig
from spark_me.config.tasks import PretrainConfig
from spark_me.data.datasets import Batch, HeldOutDataset, Reader, TrainDataset, collate
from spark_me.data.loaders import held_out_dataset, held_out_loader, train_loader, train_reader
from spark_me.data.sampler import Share
from spark_me.data.transforms import Normalise, held_out_transform, to_displayable, train_transform
from spark_me.data.unreadable import UnreadableFiles
from spark_me.errors import UserError
from spark_me.masking import draw_visible_of_samples

SIZE = (32, 64)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return paths


def make(files: list[Path], seed: int = 1, **arguments: int) -> TrainDataset:
    return TrainDataset(files, Reader(train_transform(DataConfig(), SIZE), seed=seed), **arguments)


def train_on(files: list[Path], data: DataConfig, size: tuple[int, int]) -> TrainDataset:
    return TrainDataset(files, Reader(train_transform(data, size), seed=0))


def held_out(files: list[Path], data: DataConfig, size: tuple[int, int]) -> HeldOutDataset:
    return HeldOutDataset(files, Reader(held_out_transform(data, size), seed=0))


def test_sample_depends_on_seed_epoch_and_index_alone(files: list[Path]) -> None:
    dataset = make(files)
    first = dataset[(3, 2)].image
    torch.rand(7)  # neither the state of the default generator
    dataset[(0, 0)]  # nor an earlier sample matters
    assert torch.equal(dataset[(3, 2)].image, first)
    assert not torch.equal(dataset[(4, 2)].image, first)
    assert not torch.equal(make(files, seed=2)[(3, 2)].image, first)


def test_sample_leaves_the_default_generator_alone(files: list[Path]) -> None:
    before = torch.get_rng_state()
    make(files)[(0, 0)]
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_of_one_file_differ_within_an_epoch(files: list[Path]) -> None:
    dataset = make(files, repeats=3)
    assert len(dataset) == 18
    crops = [dataset[(0, 4 + 6 * repeat)].image for repeat in range(3)]
    assert not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[1], crops[2])


def test_loaded_batches_are_the_same_with_any_number_of_workers(files: list[Path]) -> None:
    config = PretrainConfig()
    config.model.image_size = list(SIZE)
    config.train.batch_size = 4
    runs = []
    for workers in (0, 2):
        config.data.workers = workers
        runs.append(list(loader_of(files, config)))
    assert len(runs[0]) == 3
    for one, other in zip(*runs):
        assert one.images.shape == (4, 3, *SIZE)
        assert torch.equal(one.images, other.images)
        assert one.indices == other.indices


def test_loading_draws_nothing_from_the_default_generator(files: list[Path]) -> None:
    config = PretrainConfig()
    config.model.image_size = list(SIZE)
    config.data.workers = 0
    before = torch.get_rng_state()
    list(loader_of(files, config))
    list(held_out_loader(held_out_dataset(files, config.data, config.model, seed=0), 4, workers=0, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)


def loader_of(files: list[Path], config: PretrainConfig) -> torch.utils.data.DataLoader:
    reader, share = train_reader(config.data, config.model, seed=0), Share(4, steps=3, seed=0)
    return train_loader(files, reader, config.data, share, most_unreadable=0, pin_memory=False)


def test_unreadable_file_is_replaced_by_the_next_and_recorded(files: list[Path]) -> None:
    files[2].write_bytes(b"no image")
    files[3].write_bytes(files[3].read_bytes()[:100])
    dataset = make(files, most_unreadable=2)
    sample = dataset[(0, 2)]
    assert [path for path, _ in sample.unreadable] == [str(files[2]), str(files[3])]
    assert sample.sample_index == 2
    # The crop is drawn for sample 2 from file 4.
    moved = make([files[4]] * 6)
    assert torch.equal(sample.image, moved[(0, 2)].image)


def test_too_many_unreadable_files_end_the_search(files: list[Path]) -> None:
    for path in files:
        path.write_bytes(b"no image")
    sample = make(files, most_unreadable=2)[(0, 0)]
    assert sample.image is None
    assert len(sample.unreadable) == 3
    assert make(files, most_unreadable=100)[(0, 0)].image is None


def test_batch_without_its_unreadable_samples(files: list[Path]) -> None:
    files[1].write_bytes(b"no image")
    dataset = held_out(files, DataConfig(), SIZE)
    batch = collate([dataset[index] for index in range(3)])
    assert batch.indices == [0, 2]
    assert batch.images.shape == (2, 3, *SIZE)
    assert [path for path, _ in batch.unreadable] == [str(files[1])]
    assert collate([dataset[1]]).indices == []


def test_batch_is_pinned_as_a_batch() -> None:
    # DataLoader pins named tuples field by field and keeps their type.
    assert Batch._fields == ("images", "indices", "unreadable", "valid", "labels", "visible")


def test_held_out_image_is_its_normalised_centre(tmp_path: Path) -> None:
    # Red, green and blue thirds; the centre of the shape 1:1 is green alone.
    pixels = np.zeros((60, 180, 3), dtype=np.uint8)
    for channel in range(3):
        pixels[:, 60 * channel : 60 * (channel + 1), channel] = 255
    Image.fromarray(pixels).save(tmp_path / "thirds.png")
    data = DataConfig(mean=[0.5, 0.25, 0.0], std=[0.5, 0.25, 2.0])
    image = held_out([tmp_path / "thirds.png"], data, (32, 32))[0].image
    assert image is not None and image.dtype == torch.float32
    middle = image[:, 16, 16]
    torch.testing.assert_close(middle, torch.tensor([-1.0, 3.0, 0.0]))
    torch.testing.assert_close(to_displayable(image[None], data)[0, :, 16, 16], torch.tensor([0.0, 1.0, 0.0]))


def test_flip_and_crop_scale_are_obeyed(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    whole = DataConfig(crop_scale=[1.0, 1.0], flip=1.0, mean=[0.0] * 3, std=[1.0] * 3)
    flipped = train_on([tmp_path / "ramp.png"], whole, (64, 64))
    # At scale 1 the crop may only change its shape, so try samples until one took the whole square.
    images = [flipped[(epoch, 0)].image for epoch in range(20)]
    assert all(image[0, 0, 0] > image[0, 0, -1] for image in images)
    small = DataConfig(crop_scale=[0.01, 0.01], flip=0.0, mean=[0.0] * 3, std=[1.0] * 3)
    image = train_on([tmp_path / "ramp.png"], small, (64, 64))[(0, 0)].image
    assert image.max() - image.min() < 0.2 * 64 / 255


def test_unreadable_files_are_listed_and_limited() -> None:
    written: list[str] = []
    reasons: dict[str, str] = {}
    unreadable = UnreadableFiles(reasons, files=20, share=0.1, write=written.append)
    unreadable.add([])
    assert written == []
    unreadable.add([("b.png", "truncated"), ("a.png", "no image")])
    unreadable.add([("a.png", "no image")])  # again, in the next epoch
    assert written == ["a.png\tno image\nb.png\ttruncated\n"]
    with pytest.raises(UserError, match="3 of 20 images are unreadable.*c.png.*data.max_unreadable=0.1"):
        unreadable.add([("c.png", "no image")])
    assert "c.png" in written[-1]
    assert reasons.keys() == {"a.png", "b.png", "c.png"}


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_normalised_as_a_batch_are_what_crops_are_normalised_to(files: list[Path], channels: int) -> None:
    data = DataConfig()
    for path in files[:3]:
        samples = []
        for as_bytes in (False, True):
            transform = train_transform(data, SIZE, channels, as_bytes=as_bytes)
            samples.append(Reader(transform, seed=0, channels=channels).crop(path, 2, 1).image)
        floats, raw = samples
        assert raw.dtype == torch.uint8 and raw.shape == floats.shape
        normalised = Normalise(data, channels, torch.device("cpu"))(raw[None])[0]
        torch.testing.assert_close(normalised, floats, rtol=0, atol=1e-6)
        assert torch.equal(Normalise(data, channels, torch.device("cpu"))(floats[None])[0], floats)


def test_a_training_samples_mask_is_that_of_its_epoch_and_index(files: list[Path]) -> None:
    config = PretrainConfig()
    config.model.image_size = [224, 160]
    reader = train_reader(config.data, config.model, seed=7)
    sample = TrainDataset(files, reader)[(3, 4)]
    assert torch.equal(sample.visible, draw_visible_of_samples(7, 3, [4], (7, 5), 0.6)[0])
