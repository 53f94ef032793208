"""From a labelled image to what the network sees: augmented for training, a centre crop for tests."""

from collections.abc import Callable, Sequence

import torch
from torchvision.transforms import InterpolationMode, v2

from spark_me.config_data import statistics_of
from spark_me.config_finetune import FinetuneDataConfig
from spark_me.data.reading import Picture
from spark_me.data.transforms import Crop, ShortEdgeCrop, require_moderate

ERASED = (0.02, 1 / 3)
"""Smallest and largest share of a crop's area that is erased."""


class LabelledTransform:
    """Augments and normalises; draws from torch's default generator."""

    def __init__(
        self, steps: Sequence[Callable], data: FinetuneDataConfig, channels: int, erasing: float = 0.0
    ) -> None:
        """
        Args:
            steps: change an image or a tensor [C, H, W] before it is normalised.
            data: with the statistics of the channels.
            channels: C.
            erasing: probability that a rectangle becomes noise.
        """
        mean, std = statistics_of(data, channels)
        erase = [v2.RandomErasing(erasing, scale=ERASED, value="random")] if erasing else []
        normalise = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        self.apply = v2.Compose([*steps, *normalise, *erase, v2.ToPureTensor()])

    def __call__(self, picture: Picture) -> Crop:
        return Crop(require_moderate(self.apply(picture), picture), None)


def augmentation(data: FinetuneDataConfig, channels: int) -> LabelledTransform:
    """Random resized crop and flip; TrivialAugmentWide and erasing as the configuration has them."""
    assert data.train_crop is not None  # settled with the weights
    crop = v2.RandomResizedCrop(
        data.train_crop,
        scale=(data.crop_scale[0], data.crop_scale[1]),
        interpolation=InterpolationMode(data.interpolation),
        antialias=True,
    )
    steps = [crop, v2.RandomHorizontalFlip(data.flip)]
    if data.trivial_augment:
        steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    return LabelledTransform(steps, data, channels, data.erasing)


def centre_crop(data: FinetuneDataConfig, channels: int) -> LabelledTransform:
    """The shorter edge resized, then the centre."""
    assert data.test_resize is not None and data.test_crop is not None
    return LabelledTransform([ShortEdgeCrop(data.test_resize, data.test_crop, data.interpolation)], data, channels)
