"""Data sets over images. Samples depend on (seed, epoch, index) alone; unreadable images travel as records."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from spark_me.data.class_folders import Labelled
from spark_me.data.reading import Encoded, Item, Items, Picture, Reduced, Reduction, read_image, read_reduced
from spark_me.data.sampler import CROP, seed_of
from spark_me.data.transforms import Crop, LabelledTransform
from spark_me.data.unreadable import UnreadableImage
from spark_me.masking import draw_visible_of_samples


class Sample(NamedTuple):
    """One image and what went wrong on the way to it."""

    image: Tensor | None
    """As of `Crop`; None where no readable image was found."""
    sample_index: int
    """Which sample of the epoch it is."""
    unreadable: list[tuple[str, str]]
    """(name, reason) of images that were skipped for it."""
    valid: Tensor | None = None
    """bool [fh, fw], the patches without a nodata pixel; None where nodata is not asked for."""
    label: int | None = None
    """The image's class; None where there are none."""
    visible: Tensor | None = None
    """bool [fh, fw], the patches that are not hidden; None where no mask is drawn."""


class Batch(NamedTuple):
    """What a step is computed from."""

    images: Tensor
    """float32 [B, C, H, W], or uint8 for `Normalise`; empty when no sample was readable."""
    indices: list[int]
    """B sample indices."""
    unreadable: list[tuple[str, str]]
    """(name, reason) of images that were skipped."""
    valid: Tensor | None = None
    """bool [B, fh, fw], the patches without a nodata pixel; None where nodata is not asked for."""
    labels: Tensor | None = None
    """int64 [B], the images' classes; None where there are none."""
    visible: Tensor | None = None
    """bool [B, fh, fw], the patches that are not hidden; None where no masks are drawn."""


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the samples that have an image; gather what could not be read."""
    unreadable = [record for sample in samples for record in sample.unreadable]
    images = {sample.sample_index: sample.image for sample in samples if sample.image is not None}
    valid = [sample.valid for sample in samples if sample.valid is not None]
    masks = [sample.visible for sample in samples if sample.visible is not None]
    labels = [sample.label for sample in samples if sample.image is not None and sample.label is not None]
    return Batch(
        torch.stack(list(images.values())) if images else torch.empty(0),
        list(images),
        unreadable,
        torch.stack(valid) if valid else None,
        torch.tensor(labels) if labels else None,
        torch.stack(masks) if masks else None,
    )


class Masks(NamedTuple):
    """What masks are drawn for."""

    grid: tuple[int, int]
    """(fh, fw)"""
    mask_ratio: float


class Reader:
    """Reads images and draws their crops."""

    def __init__(
        self,
        transform: Callable[[Any], Crop],
        *,
        seed: int,
        channels: int = 3,
        nodata: float | None = None,
        masks: Masks | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        """
        Args:
            transform: of a picture, drawing from torch's default generator.
            seed: the run's seed.
            channels: 3 for RGB, 1 for grey, or what the images have.
            nodata: the stored value of pixels without data.
            masks: which masks are drawn, if any.
            reduction: how much smaller an image may be decoded for the crop that `transform` would draw now.
        """
        self.transform = transform
        self.seed = seed
        self.channels = channels
        self.nodata = nodata
        self.masks = masks
        self.reduction = reduction

    def crop(self, item: Item, epoch: int, index: int) -> Crop:
        """What the model sees of an image as sample `index` of `epoch`.

        Raises:
            UnreadableImage: if it cannot be used.
        """
        seed = seed_of(CROP, self.seed, epoch, index)
        # The transforms draw from torch's default CPU generator, which must come out of this as it went in.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            picture = self.read(item)
            torch.default_generator.manual_seed(seed)  # the reduction is that of the crop which is drawn now
            crop = self.transform(picture)
        if self.masks is None:
            return crop
        valid = None if crop.valid is None else crop.valid[None]
        (visible,) = draw_visible_of_samples(self.seed, epoch, [index], *self.masks, valid)
        return crop._replace(visible=visible)

    def read(self, item: Item) -> Picture | Reduced:
        """The image, as large as its crop needs it."""
        if self.reduction is None:
            return read_image(item, self.channels, self.nodata)
        return read_reduced(item, self.channels, self.nodata, self.reduction)


class TrainDataset(Dataset[Sample]):
    """Random crops of images that are read in any order; an epoch has `repeats` crops of each."""

    def __init__(self, items: Items, reader: Reader, *, repeats: int = 1, most_unreadable: int = 0) -> None:
        """
        Args:
            items: the images.
            reader: draws the crops.
            repeats: crops of each image in an epoch.
            most_unreadable: how many images may be unreadable before the run stops.
        """
        self.items = items
        self.reader = reader
        self.repeats = repeats
        self.most_unreadable = most_unreadable

    def __len__(self) -> int:
        return len(self.items) * self.repeats

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of `key` = (epoch, index)."""
        epoch, index = key
        unreadable: list[tuple[str, str]] = []
        # An unreadable image is replaced by the next one, the same at every repetition of the run.
        while len(unreadable) <= self.most_unreadable and len(unreadable) < len(self.items):
            item = self.items[(index + len(unreadable)) % len(self.items)]
            try:
                crop = self.reader.crop(item, epoch, index)
            except UnreadableImage as reason:
                unreadable.append((str(item), str(reason)))
            else:
                return Sample(crop.image, index, unreadable, crop.valid, visible=crop.visible)
        # More failures than the run accepts: whoever receives these records stops the run.
        return Sample(None, index, unreadable)


class StreamDataset(Dataset[Sample]):
    """Random crops of images that the sampler brings along."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, key: tuple[int, int, Encoded]) -> Sample:
        """The sample of `key` = (epoch, index, image)."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int, Encoded]]) -> list[Sample]:
        """The samples of a batch. An unreadable image is replaced by another crop of the next in the batch."""
        failed: set[int] = set()
        return [self._sample(keys, place, failed) for place in range(len(keys))]

    def _sample(self, keys: Sequence[tuple[int, int, Encoded]], place: int, failed: set[int]) -> Sample:
        epoch, index, _ = keys[place]
        unreadable: list[tuple[str, str]] = []
        for candidate in (*range(place, len(keys)), *range(place)):
            if candidate in failed:
                continue
            item = keys[candidate][2]
            try:
                crop = self.reader.crop(item, epoch, index)
            except UnreadableImage as reason:
                failed.add(candidate)
                unreadable.append((item.name, str(reason)))
            else:
                return Sample(crop.image, index, unreadable, crop.valid, visible=crop.visible)
        return Sample(None, index, unreadable)


class HeldOutDataset(Dataset[Sample]):
    """Centre crops of images, the same every time."""

    def __init__(self, items: Items, reader: Reader) -> None:
        self.items = items
        self.reader = reader

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item = self.items[index]
        try:
            crop = self.crop(item, index)
        except UnreadableImage as reason:
            return Sample(None, index, [(str(item), str(reason))])
        return Sample(crop.image, index, [], crop.valid)

    def crop(self, item: Item, index: int) -> Crop:
        """What the model sees of `items[index]`, with the pixels without data.

        Raises:
            UnreadableImage: if it cannot be used.
        """
        return self.reader.crop(item, 0, index)


class LabelledTrainDataset(TrainDataset):
    """Augmented crops; an unreadable image is replaced by the next one, with its label."""

    def __init__(self, images: Labelled, reader: Reader, *, repeats: int = 1, most_unreadable: int = 0) -> None:
        super().__init__(images.paths, reader, repeats=repeats, most_unreadable=most_unreadable)
        self.labels = images.labels

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        sample = super().__getitem__(key)
        place = (sample.sample_index + len(sample.unreadable)) % len(self.labels)
        return sample._replace(label=self.labels[place])


class LabelledTestDataset(HeldOutDataset):
    """Test crops, the same every time."""

    def __init__(self, images: Labelled, reader: Reader) -> None:
        super().__init__(images.paths, reader)
        self.labels = images.labels

    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index)._replace(label=self.labels[index])


class CachingReader(Reader):
    """Reads every image once, and keeps it decoded: wholly, as every epoch has another crop."""

    def __init__(self, transform: LabelledTransform, *, seed: int, channels: int) -> None:
        super().__init__(transform, seed=seed, channels=channels)
        self._pictures: dict[str, Picture] = {}

    def read(self, item: Item) -> Picture:
        name = str(item)
        if name not in self._pictures:
            self._pictures[name] = read_image(item, self.channels)
        return self._pictures[name]
