"""Data sets over lists of files. Samples depend on (seed, epoch, index) alone; unreadable files travel as records."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from spark_me.data.randomness import CROP, seed_of
from spark_me.data.reading import UnreadableImage, read_image
from spark_me.data.transforms import Transform


class Sample(NamedTuple):
    """One image and what went wrong on the way to it."""

    image: Tensor | None
    """float32 [C, H, W]; None where no readable file was found."""
    sample_index: int
    """Which sample of the epoch it is."""
    unreadable: list[tuple[str, str]]
    """(path, reason) of files that were skipped for it."""


class Batch(NamedTuple):
    """What a step is computed from."""

    images: Tensor
    """float32 [B, C, H, W]; empty when no sample was readable."""
    indices: list[int]
    """B sample indices."""
    unreadable: list[tuple[str, str]]
    """(path, reason) of files that were skipped."""


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the samples that have an image; gather what could not be read."""
    unreadable = [record for sample in samples for record in sample.unreadable]
    images = {sample.sample_index: sample.image for sample in samples if sample.image is not None}
    return Batch(torch.stack(list(images.values())) if images else torch.empty(0), list(images), unreadable)


class TrainDataset(Dataset[Sample]):
    """Random crops of images; an epoch has `repeats` crops of each."""

    def __init__(
        self,
        files: Sequence[Path],
        transform: Transform,
        *,
        seed: int,
        channels: int = 3,
        repeats: int = 1,
        most_unreadable: int = 0,
    ) -> None:
        """
        Args:
            files: the images.
            transform: draws from torch's default generator.
            seed: the run's seed.
            channels: 3 for RGB, 1 for grey.
            repeats: crops of each file in an epoch.
            most_unreadable: how many files may be unreadable before the run stops.
        """
        self.files = list(files)
        self.transform = transform
        self.seed = seed
        self.channels = channels
        self.repeats = repeats
        self.most_unreadable = most_unreadable

    def __len__(self) -> int:
        return len(self.files) * self.repeats

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of `key` = (epoch, index)."""
        epoch, index = key
        unreadable: list[tuple[str, str]] = []
        # An unreadable file is replaced by the next one, the same at every repetition of the run.
        while len(unreadable) <= self.most_unreadable and len(unreadable) < len(self.files):
            path = self.files[(index + len(unreadable)) % len(self.files)]
            try:
                image = read_image(path, self.channels)
            except UnreadableImage as reason:
                unreadable.append((str(path), str(reason)))
            else:
                return Sample(self._augment(image, epoch, index), index, unreadable)
        # More failures than the run accepts: whoever receives these records stops the run.
        return Sample(None, index, unreadable)

    def _augment(self, image: Image, epoch: int, index: int) -> Tensor:
        # The transforms draw from torch's default CPU generator, which must come out of this as it went in.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(CROP, self.seed, epoch, index))
            return self.transform(image)


class HeldOutDataset(Dataset[Sample]):
    """Centre crops of images, the same every time."""

    def __init__(self, files: Sequence[Path], transform: Transform, channels: int = 3) -> None:
        self.files = list(files)
        self.transform = transform
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        try:
            image = read_image(self.files[index], self.channels)
        except UnreadableImage as reason:
            return Sample(None, index, [(str(self.files[index]), str(reason))])
        return Sample(self.transform(image), index, [])
