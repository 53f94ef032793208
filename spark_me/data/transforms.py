"""From a decoded image to the tensor that the model sees, and back to one that the eye sees."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from spark_me.config_schema import DataConfig

Transform = Callable[[Image.Image], Tensor]

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def train_transform(data: DataConfig, image_size: Sequence[int]) -> Transform:
    """Random resized crop and flip, drawn from torch's default generator; float32 [C, H, W], normalised."""
    crop = v2.RandomResizedCrop(
        list(image_size),
        scale=(data.crop_scale[0], data.crop_scale[1]),
        interpolation=InterpolationMode(data.interpolation),
        antialias=True,
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip(data.flip), *_to_normalised_tensor(data)])


def held_out_transform(data: DataConfig, image_size: Sequence[int]) -> Transform:
    """The largest centred crop of the image's shape, resized; float32 [C, H, W], normalised."""
    height, width = image_size

    def centre(image: Image.Image) -> Image.Image:
        return ImageOps.fit(image, (width, height), RESAMPLING[data.interpolation])

    return v2.Compose([centre, *_to_normalised_tensor(data)])


def to_displayable(images: Tensor, data: DataConfig) -> Tensor:
    """Undo the normalisation: float [B, C, H, W] in 0 to 1, clipped."""
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (data.mean, data.std))
    return (images * std + mean).clamp(0, 1)


def _to_normalised_tensor(data: DataConfig) -> list[Callable]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std), v2.ToPureTensor()]
