"""Labelled images: which there are, which part of them is used, and how they are seen."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_finetune import tiny_config, write_classes

from spark_me.config.data import FinetuneDataConfig
from spark_me.data.class_folders import balanced_part, balanced_places, find_classes, find_labelled
from spark_me.data.datasets import Batch, LabelledTrainDataset
from spark_me.data.loaders import labelled_train_loader, labelled_train_reader
from spark_me.data.sampler import Share, StepSampler
from spark_me.data.transforms import augmentation, centre_crop
from spark_me.errors import UserError


def test_classes_are_the_sorted_folders(tmp_path: Path) -> None:
    files = find_labelled(FinetuneDataConfig(root=str(write_classes(tmp_path))), seed=0)
    assert files.classes == ["blue", "green", "red"]
    assert [(path.parent.name, label) for path, label in zip(*files.val)] == [
        (name, label) for label, name in enumerate(files.classes) for _ in range(2)
    ]
    apart = FinetuneDataConfig(root=str(tmp_path / "train"), val_root=str(tmp_path / "val"))
    assert find_labelled(apart, seed=0) == files


@pytest.mark.parametrize(("fraction", "expected"), [(0.01, 1), (0.25, 2), (0.5, 5), (1.0, 10)])
def test_fraction_is_balanced_and_seeded(tmp_path: Path, fraction: float, expected: int) -> None:
    data = FinetuneDataConfig(root=str(write_classes(tmp_path, train=10)), fraction=fraction)
    files = find_labelled(data, seed=0)
    assert Counter(files.train.labels) == dict.fromkeys(range(3), expected)
    assert all(path.parent.name == files.classes[label] for path, label in zip(*files.train))
    assert find_labelled(data, seed=0) == files
    others = [find_labelled(data, seed=seed).train.paths for seed in range(1, 5)]
    assert any(other != files.train.paths for other in others) == (fraction < 1)


def test_balanced_places_are_the_rounded_share_of_every_class() -> None:
    labels = [3] * 100 + [5] * 10 + [8]
    places = balanced_places(labels, 0.1, seed=0)
    assert [sum(labels[place] == label for place in places) for label in (3, 5, 8)] == [10, 1, 1]
    assert sorted(set(places)) == places == balanced_places(labels, 0.1, seed=0)
    assert places != balanced_places(labels, 0.1, seed=1)
    assert balanced_places(labels, 1.0, seed=0) == list(range(111))


def test_probing_and_fine_tuning_draw_the_same_images(tmp_path: Path) -> None:
    root = write_classes(tmp_path, train=10)
    tuned = find_labelled(FinetuneDataConfig(root=str(root), fraction=0.3), seed=2).train
    images, classes = find_classes(root / "train", "--train")
    assert balanced_part(images, 0.3, 2) == tuned and len(tuned.labels) == 3 * len(classes)
    assert all(path.parts[-2] == classes[label] for path, label in zip(images.paths, images.labels))


def test_smaller_fractions_lie_within_larger_ones(tmp_path: Path) -> None:
    root = str(write_classes(tmp_path, train=10))
    small, large = (find_labelled(FinetuneDataConfig(root=root, fraction=share), 3).train for share in (0.2, 0.6))
    assert set(small.paths) < set(large.paths)


def test_bad_folders(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "images")

    def message() -> str:
        with pytest.raises(UserError) as caught:
            find_labelled(FinetuneDataConfig(root=str(root)), seed=0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (root / "train" / "empty").mkdir()
    assert "its train/: no images in 1 class folders (empty)" in message()
    write_classes(tmp_path / "more", classes=["violet"])
    (root / "train" / "empty").rmdir()
    (tmp_path / "more" / "train" / "violet").rename(root / "train" / "violet")
    assert "4 classes to train on and 3 to validate on differ (in one of them alone: violet)" in message()
    (root / "val").rename(root / "elsewhere")
    assert "its val/: no such folder" in message()
    (root / "val").mkdir()
    assert "its val/: has no class folders" in message()
    (root / "val" / "red").mkdir()
    assert "its val/: has one class folder alone" in message()


def test_label_is_that_of_the_image_that_replaces_an_unreadable_one(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    root = write_classes(tmp_path / "images", train=1)
    (root / "train" / "green" / "0.png").write_bytes(b"no image")
    files = find_labelled(config.data, seed=0)
    dataset = LabelledTrainDataset(
        files.train, labelled_train_reader(config.data, 3, seed=0), repeats=2, most_unreadable=1
    )
    assert [dataset[0, index].label for index in range(6)] == [0, 2, 2, 0, 2, 2]
    blue, red = dataset[0, 0].image, dataset[0, 1].image
    assert blue is not None and red is not None
    assert blue[2].mean() > blue[0].mean() and red[2].mean() < red[0].mean()


def test_repeated_augmentation_has_other_crops_of_the_same_images(tmp_path: Path) -> None:
    write_classes(tmp_path / "images")
    config = tiny_config(tmp_path, "data.repeated_augmentation=2", "train.batch_size=6")
    files = find_labelled(config.data, seed=0)
    reader = labelled_train_reader(config.data, 3, seed=0)

    def load(first_step: int) -> Iterable[Batch]:
        share = Share(6, 4, seed=0, first_step=first_step)
        return labelled_train_loader(files.train, reader, config.data, share, most_unreadable=0, pin_memory=False)

    batches = list(load(first_step=0))
    assert len(batches) == 4
    for batch in batches:
        images = [index % 12 for index in batch.indices]
        assert images[::2] == images[1::2] and len(set(images)) == 3
        assert not torch.equal(batch.images[0], batch.images[1])
    epochs = [{index % 12 for batch in batches[start : start + 2] for index in batch.indices} for start in (0, 2)]
    assert [len(epoch) for epoch in epochs] == [6, 6] and epochs[0] != epochs[1]
    later = next(iter(load(first_step=3)))
    assert later.indices == batches[3].indices and torch.equal(later.images, batches[3].images)
    parts = [list(StepSampler(12, Share(6, 4, seed=0, rank=rank, world_size=2), copies=2))[0] for rank in (0, 1)]
    assert [index % 12 for _, index in parts[0]] == [index % 12 for _, index in parts[1]]


def test_test_crop_is_the_centre_of_the_resized_image() -> None:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    data = FinetuneDataConfig(test_resize=20, test_crop=16)
    resized = np.asarray(picture.resize((30, 20), Image.Resampling.BICUBIC))[2:18, 7:23]
    expected = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    image = centre_crop(data, 3)(picture).image
    torch.testing.assert_close(image.double(), torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-5)


def test_augmentation_erases_and_changes_colours_of_grey_images_too() -> None:
    torch.manual_seed(0)
    grey = Image.fromarray(np.full((40, 40), 128, dtype=np.uint8))
    plain = augmentation(FinetuneDataConfig(train_crop=32), 1)(grey).image
    assert plain.shape == (1, 32, 32) and plain.unique().numel() == 1
    erase = augmentation(FinetuneDataConfig(train_crop=32, erasing=1.0), 1)
    for _ in range(20):
        erased = erase(grey).image != plain
        assert 0.015 < erased.float().mean() < 0.35
    change = augmentation(FinetuneDataConfig(train_crop=32, trivial_augment=True), 1)
    assert any(not torch.equal(change(grey).image, plain) for _ in range(20))
