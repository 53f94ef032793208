"""From a decoded image to the tensor that the model sees, and back to one that the eye sees."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from spark_me.config.data import DataConfig, FinetuneDataConfig, ImagesConfig, Statistics, statistics_of
from spark_me.data.reading import REDUCTIONS, Picture, Reduced, Reduction
from spark_me.data.unreadable import UnreadableImage
from spark_me.devices import copy_to
from spark_me.masking import MIN_VALID

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ATTEMPTS = 10
"""Random crops that are tried of an image with nodata pixels before it is skipped."""
DEVIATIONS = 2.5
"""How far from the mean values are shown that are no photo's."""


FARTHEST = 1e12
"""Deviations from the mean: sums of squares of what is farther away would overflow in float32."""


class Crop(NamedTuple):
    """What the model sees of an image."""

    image: Tensor
    """float32 [C, H, W], normalised; 0 where there is no data. Or uint8, for `Normalise`."""
    valid: Tensor | None
    """bool [fh, fw], the patches without a nodata pixel; None where nodata is not asked for."""
    without_data: Tensor | None = None
    """bool [H, W], nodata pixels and those they had a part in; None as for `valid`. Batches go without it."""
    visible: Tensor | None = None
    """bool [fh, fw], the patches that are not hidden; None where no mask is drawn."""


class RandomCrop(v2.RandomResizedCrop):
    """torchvision's, also of images that were decoded smaller: it is drawn from the size of the whole."""

    def __init__(self, data: ImagesConfig, size: int | Sequence[int]) -> None:
        """`size`: the side of a square, or (H, W)."""
        smallest, largest = data.crop_scale
        super().__init__(
            size, scale=(smallest, largest), interpolation=InterpolationMode(data.interpolation), antialias=True
        )
        self.reduction: Reduction | None = self._reduction if data.draft else None
        """How much smaller an image may be decoded for the crop that would be drawn now."""

    def forward(self, picture: Picture | Reduced) -> Picture:
        """Crop an image or a tensor [C, H, W], and resize."""
        if isinstance(picture, Reduced):
            box = self._draw(picture.place.height, picture.place.width)
            return picture.resize(box, self.size, RESAMPLING[self.interpolation.value])
        crop: Picture = super().forward(picture)
        return crop

    def _draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width)"""
        box = self.make_params([torch.empty(0, height, width)])
        return box["top"], box["left"], box["height"], box["width"]

    def _reduction(self, height: int, width: int) -> int:
        _, _, *sides = self._draw(height, width)
        most = min(side // resized for side, resized in zip(sides, self.size))
        return next((reduction for reduction in REDUCTIONS if reduction <= most), 1)


class Transform:
    """Crops, normalises, and finds the patches that have data."""

    def __init__(
        self,
        geometry: Callable,
        data: DataConfig,
        channels: int,
        patch_size: int,
        attempts: int,
        *,
        as_bytes: bool = False,
        reduction: Reduction | None = None,
    ) -> None:
        """
        Args:
            geometry: crops and resizes an image or a tensor [C, H, W].
            data: with `nodata` and the statistics of the channels.
            channels: C.
            patch_size: P, the side of the patches that are judged by their data.
            attempts: how often to crop until there is enough data; more than 1 for random crops.
            as_bytes: leave 8-bit images as uint8, a quarter of the bytes, for `Normalise` to finish.
            reduction: of `RandomCrop`, if that is part of the geometry.
        """
        mean, std = statistics_of(data, channels)
        self.normalise = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
        )
        self.geometry = geometry
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.nodata = data.nodata is not None
        self.patch_size = patch_size
        self.attempts = attempts
        self.as_bytes = as_bytes
        self.reduction = reduction

    def __call__(self, picture: Picture | Reduced) -> Crop:
        """Crop a picture.

        Raises:
            UnreadableImage: if too few patches of any crop have data, or values overflow.
        """
        if self.as_bytes and not isinstance(picture, Tensor):
            return Crop(v2.functional.pil_to_tensor(self.geometry(picture)), None)
        if not self.nodata:
            return Crop(require_moderate(self.normalise(self.geometry(picture)), picture), None)
        assert isinstance(picture, Tensor)  # RGB and grey images are read as tensors, too, where nodata is asked for
        marked = self._mark(picture)
        most = 0
        for _ in range(self.attempts):
            crop = self.geometry(marked)
            without_data = crop[-1].isnan()
            valid = _patches_with_data(without_data, self.patch_size)
            if valid.sum() >= MIN_VALID:
                image = self.normalise(crop[:-1]).masked_fill(without_data, 0)
                return Crop(require_moderate(image, picture), valid, without_data)
            most = max(most, int(valid.sum()))
        crops = f"in the best of {self.attempts} crops" if self.attempts > 1 else "in its centre crop"
        raise UnreadableImage(f"nodata: {most} of {valid.numel()} patches have data {crops}, {MIN_VALID} are needed")

    def _mark(self, picture: Tensor) -> Tensor:
        """Fill nodata pixels with the mean, and append a channel that is NaN there and 0 elsewhere.

        However pixels are resampled, NaN spreads to whatever they have a part in.
        """
        without_data = picture[:1].isnan()
        filled = torch.where(without_data, self.mean, picture)
        return torch.cat([filled, torch.where(without_data, torch.nan, 0.0)])


def require_moderate(image: Tensor, picture: Picture | Reduced) -> Tensor:
    """The normalised image [C, H, W] of a picture, if a network can compute with it.

    Raises:
        UnreadableImage: if it is not finite, or lies too far from the mean.
    """
    if isinstance(picture, Tensor) and not (image.abs() <= FARTHEST).all():
        raise UnreadableImage(
            f"has pixels more than {FARTHEST:.0e} deviations from the mean: correct data.mean and data.std, or set "
            "data.nodata to the value that means no data"
        )
    return image


class CentreCrop:
    """The largest centred crop of a shape, resized."""

    def __init__(self, image_size: Sequence[int], interpolation: str) -> None:
        self.height, self.width = image_size
        self.interpolation = interpolation

    def __call__(self, picture: Picture) -> Picture:
        """Crop an image or a tensor [C, H, W] to height × width."""
        if isinstance(picture, Image.Image):
            return ImageOps.fit(picture, (self.width, self.height), RESAMPLING[self.interpolation])
        height, width = picture.shape[-2:]
        scale = min(height / self.height, width / self.width)
        crop = v2.CenterCrop([max(1, round(self.height * scale)), max(1, round(self.width * scale))])
        size = [self.height, self.width]
        resize = v2.Resize(size, interpolation=InterpolationMode(self.interpolation), antialias=True)
        resized: Tensor = resize(crop(picture))
        return resized


class ShortEdgeCrop:
    """An image resized by its short edge, then cropped at its centre."""

    def __init__(self, resize: int, crop: int, interpolation: str) -> None:
        """
        Args:
            resize: pixels of the short edge.
            crop: side of the square that is kept.
            interpolation: bicubic or bilinear, antialiased.
        """
        self.resize, self.size = resize, (crop, crop)
        scale = v2.Resize(resize, interpolation=InterpolationMode(interpolation), antialias=True)
        self.geometry = v2.Compose([scale, v2.CenterCrop(crop)])

    def __call__(self, picture: Picture) -> Picture:
        """Crop an image or a tensor [C, H, W].

        Raises:
            UnreadableImage: if the image is so elongated that it would take too much memory.
        """
        short, long = sorted(v2.functional.get_size(picture))
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and self.resize**2 * long / short > limit:
            raise UnreadableImage(f"too elongated: {long} by {short} pixels")
        cropped: Picture = self.geometry(picture)
        return cropped


class Normalise:
    """What a `Transform` leaves to be done of uint8 images, for whole batches on any device."""

    def __init__(self, data: DataConfig, channels: int, device: torch.device) -> None:
        statistics = (torch.tensor(values).view(-1, 1, 1) for values in statistics_of(data, channels))
        self.mean, self.std = (copy_to(values, device) for values in statistics)

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W], uint8 or normalised already → float32, normalised."""
        if images.dtype != torch.uint8:
            return images
        return images.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)


def train_transform(
    data: DataConfig, image_size: Sequence[int], channels: int = 3, patch_size: int = 32, *, as_bytes: bool = False
) -> Transform:
    """Random resized crop and flip, drawn from torch's default generator."""
    crop = RandomCrop(data, list(image_size))
    geometry = v2.Compose([crop, v2.RandomHorizontalFlip(data.flip)])
    return Transform(geometry, data, channels, patch_size, ATTEMPTS, as_bytes=as_bytes, reduction=crop.reduction)


def held_out_transform(
    data: DataConfig, image_size: Sequence[int], channels: int = 3, patch_size: int = 32
) -> Transform:
    """The largest centred crop of the image's shape, resized."""
    return Transform(CentreCrop(image_size, data.interpolation), data, channels, patch_size, attempts=1)


class Display(NamedTuple):
    """How images of so many channels are shown to the eye."""

    bands: int
    """How many channels are shown, from the first on: 3 as red, green and blue, or 1 as grey."""
    mean: list[float]
    """What 0 becomes, of each shown channel."""
    std: list[float]
    """What 1 adds to it."""
    caption: str
    """Which channels these are, and in what range; empty for plain photos."""


def display_of(data: Statistics, channels: int) -> Display:
    """Choose what is shown: of two or more than three channels, the first or the first three.

    What is no photo, because its mean is not within 0 to 1 or its values lie close together, is shown within
    2.5 deviations of its mean.
    """
    bands = 3 if channels >= 3 else 1
    mean, std = statistics_of(data, channels)
    assert mean is not None and std is not None  # a configuration without them is refused
    whole = channels == bands
    if whole and min(mean) >= 0 and max(mean) <= 1 and max(std) >= 0.1:
        return Display(bands, mean, std, "")
    which, colours, own = ("bands 1, 2, 3", "red, green, blue", "their") if bands == 3 else ("band 1", "grey", "its")
    what = colours if whole else f"{which} of {channels} as {colours}"
    caption = f"{what}, within {DEVIATIONS} deviations of {own} mean"
    return Display(bands, [0.5] * bands, [0.5 / DEVIATIONS] * bands, caption)


def to_displayable(images: Tensor, data: Statistics) -> Tensor:
    """Undo the normalisation as `display_of` says: [B, C, H, W] → float [B, 3 or 1, H, W] in 0 to 1, clipped."""
    display = display_of(data, images.shape[1])
    mean, std = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in (display.mean, display.std))
    return (images[:, : display.bands] * std + mean).clamp(0, 1)


def _patches_with_data(without_data: Tensor, patch_size: int) -> Tensor:
    """bool [H, W] of pixels → bool [fh, fw] of patches."""
    blocks = without_data.unfold(0, patch_size, patch_size).unfold(1, patch_size, patch_size)
    return ~blocks.flatten(2).any(dim=2)


ERASED = (0.02, 1 / 3)
"""Smallest and largest share of a crop's area that is erased."""


class LabelledTransform:
    """Augments and normalises; draws from torch's default generator."""

    def __init__(
        self,
        steps: Sequence[Callable],
        data: FinetuneDataConfig,
        channels: int,
        erasing: float = 0.0,
        reduction: Reduction | None = None,
    ) -> None:
        """
        Args:
            steps: change an image or a tensor [C, H, W] before it is normalised.
            data: with the statistics of the channels.
            channels: C.
            erasing: probability that a rectangle becomes noise.
            reduction: of `RandomCrop`, if that is the first step.
        """
        mean, std = statistics_of(data, channels)
        erase = [v2.RandomErasing(erasing, scale=ERASED, value="random")] if erasing else []
        normalise = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        self.apply = v2.Compose([*steps, *normalise, *erase, v2.ToPureTensor()])
        self.reduction = reduction

    def __call__(self, picture: Picture | Reduced) -> Crop:
        return Crop(require_moderate(self.apply(picture), picture), None)


def augmentation(data: FinetuneDataConfig, channels: int) -> LabelledTransform:
    """Random resized crop and flip; TrivialAugmentWide and erasing as the configuration has them."""
    assert data.train_crop is not None  # settled with the weights
    crop = RandomCrop(data, data.train_crop)
    steps = [crop, v2.RandomHorizontalFlip(data.flip)]
    if data.trivial_augment:
        steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    return LabelledTransform(steps, data, channels, data.erasing, crop.reduction)


def centre_crop(data: FinetuneDataConfig, channels: int) -> LabelledTransform:
    """The shorter edge resized, then the centre."""
    assert data.test_resize is not None and data.test_crop is not None
    return LabelledTransform([ShortEdgeCrop(data.test_resize, data.test_crop, data.interpolation)], data, channels)
