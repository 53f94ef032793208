"""From an image to what a network is tested on: read, resized, cropped, normalised."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from spark_me.config.data import STATISTICS, DataConfig
from spark_me.data.reading import Encoded, Item, Picture, read_image, to_picture
from spark_me.data.transforms import ShortEdgeCrop, Transform
from spark_me.data.unreadable import UnreadableImage
from spark_me.errors import UserError
from spark_me.networks import TOTAL_STRIDE

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
# Pixels, of the published recipes: the short edge that test images are resized to, and the centre that is kept.
RESNET_SHORT_EDGE, SHORT_EDGE, CROP = 236, 256, 224


class Preprocessing:
    """How a network is shown images.

    Attributes:
        channels: C of the images.
        data: with statistics and `nodata`.
        size: (H, W) that the network sees, in pixels.
    """

    def __init__(self, channels: int, data: DataConfig, size: tuple[int, int], geometry: Callable) -> None:
        """
        Args:
            channels: C.
            data: mean, deviation and nodata are taken.
            size: what `geometry` makes.
            geometry: resizes and crops an image or a tensor [C, H, W].
        """
        self.channels, self.data, self.size = channels, data, size
        self._transform = Transform(geometry, data, channels, attempts=1, patch_size=TOTAL_STRIDE)

    def read(self, item: Item) -> Tensor:
        """A file or its content as the network sees it: float32 [C, H, W].

        Raises:
            UnreadableImage: if it cannot be used.
        """
        return self._transform(read_image(item, self.channels, self.data.nodata)).image

    def prepare(self, image: ImageLike) -> Tensor:
        """An image as the network sees it: float32 [C, H, W].

        Args:
            image: a path; the content of a file; a PIL image; an array [H, W, C], RGB where C is 3, uint8 from 0 to 255
                or as `DataConfig.mean` counts; or a tensor [C, H, W] of such values, where floats count from 0 to 1.

        Raises:
            UserError: if it cannot be used.
        """
        name = str(image) if isinstance(image, str | os.PathLike) else "the image"
        try:
            return self._transform(self._picture(image)).image
        except UnreadableImage as reason:
            raise UserError(f"{name}: unreadable ({reason}): give an image that opens in a viewer") from None

    def _picture(self, image: ImageLike) -> Picture:
        if isinstance(image, str | os.PathLike):
            return read_image(Path(image), self.channels, self.data.nodata)
        if isinstance(image, bytes):
            return read_image(Encoded("the image", image), self.channels, self.data.nodata)
        if isinstance(image, Image.Image):
            if image.mode.startswith(("I", "F")):
                raise UnreadableImage(f"pixels are not 8 bits (mode {image.mode}): give an array")
            return to_picture(image, self.channels, self.data.nodata)
        if isinstance(image, Tensor):
            array = image.detach().cpu()
            image = (array.float() if array.is_floating_point() else array).movedim(0, -1).numpy()
        if not isinstance(image, np.ndarray):
            raise UnreadableImage(f"a {type(image).__name__}, not a path, PIL image, array or tensor")
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == self.channels == 3:
            # As from a file: resized in 8 bits.
            return to_picture(Image.fromarray(np.ascontiguousarray(image)), 3, self.data.nodata)
        self._refuse_normalised(image)
        return read_image(Encoded("the image", image), self.channels, self.data.nodata)

    def _refuse_normalised(self, image: np.ndarray) -> None:
        photos = self.data.mean in (None, *(mean for mean, _ in STATISTICS.values()))
        if photos and image.dtype.kind == "f" and image.size and not 0 <= image.min() <= image.max() <= 1:
            raise UnreadableImage(
                f"its values lie between {image.min():.2f} and {image.max():.2f}, not 0 and 1: do not normalise it"
            )


def recipe_preprocessing(channels: int, *, resnet: bool) -> Preprocessing:
    """How the published recipes test: 224 × 224, bicubic, ImageNet's statistics.

    Args:
        channels: C of the images.
        resnet: whether the network is a ResNet: others are shown a smaller part of an image.

    Raises:
        UserError: if there are no statistics of so many channels.
    """
    if channels not in STATISTICS:
        raise UserError(f"{channels} channels without mean and deviation: use a checkpoint of spark_me's trainer")
    return crop_preprocessing(DataConfig(), channels, RESNET_SHORT_EDGE if resnet else SHORT_EDGE, CROP)


def crop_preprocessing(data: DataConfig, channels: int, resize: int, crop: int) -> Preprocessing:
    """Resizing by the short edge, then the centre, both in pixels."""
    return Preprocessing(channels, data, (crop, crop), ShortEdgeCrop(resize, crop, data.interpolation))
