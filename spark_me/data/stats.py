"""`spark-me data stats`: mean and standard deviation of each channel over whole training images."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from spark_me.config import Config
from spark_me.data import arrays
from spark_me.data.files import find_files
from spark_me.data.reading import Item, read_image
from spark_me.data.unreadable import UnreadableImage
from spark_me.data.visiting import visit
from spark_me.errors import UserError
from spark_me.files import check_output, write_json


class Moments(NamedTuple):
    """What is known of the pixels of some images, float64 per channel."""

    pixels: int
    """With data."""
    mean: np.ndarray
    """[C]"""
    squares: np.ndarray
    """[C], sum of squared differences from the mean."""

    def merge(self, other: "Moments") -> "Moments":
        """Those of both together, exact but for rounding: no difference of large sums is taken."""
        pixels = self.pixels + other.pixels
        if not pixels:
            return self
        difference = other.mean - self.mean
        share = other.pixels / pixels
        squares = self.squares + other.squares + difference**2 * self.pixels * share
        return Moments(pixels, self.mean + difference * share, squares)


def stats(config: Config, sample: int | None, out: Path | None) -> None:
    """Measure the training images, and print lines for the configuration.

    Raises:
        UserError: if no image is readable, or the file cannot be written.
    """
    if sample is not None and sample < 1:
        raise UserError(f"--sample {sample}: must be at least 1")
    check_output(out, str(config.data.root))
    channels = config.model.in_channels
    images = find_files(config.data, channels).train
    function = partial(measure, channels=channels, nodata=config.data.nodata)
    total, read, unreadable = Moments(0, np.zeros(channels), np.zeros(channels)), 0, 0
    for moments in visit(images, function, workers=config.data.workers, what="measuring", sample=sample):
        if moments is None:
            unreadable += 1
        else:
            total, read = total.merge(moments), read + 1
    if not total.pixels:
        raise UserError(f"none of {unreadable + read} images has pixels that can be read: run `spark-me data check`")
    deviation = np.sqrt(total.squares / total.pixels)
    _report(total, deviation, read, unreadable)
    if out is not None:
        figures = {"mean": total.mean.tolist(), "std": deviation.tolist()}
        counts = {"images": read, "unreadable": unreadable, "pixels": total.pixels}
        write_json(out, {**figures, **counts})


def measure(item: Item, channels: int, nodata: float | None) -> Moments | None:
    """The moments of one image's pixels with data; None if it is unreadable."""
    try:
        picture = read_image(item, channels, nodata)
    except UnreadableImage:
        return None
    if isinstance(picture, Image.Image):
        values = arrays.with_channels(np.asarray(picture)).reshape(-1, channels).astype(np.float64) / 255
    else:
        values = picture.numpy().reshape(channels, -1).T.astype(np.float64)
        values = values[~np.isnan(values[:, 0])]
    if not len(values):
        return Moments(0, np.zeros(channels), np.zeros(channels))
    mean = values.mean(axis=0)
    return Moments(len(values), mean, ((values - mean) ** 2).sum(axis=0))


def _report(total: Moments, deviation: np.ndarray, read: int, unreadable: int) -> None:
    left_out = f", {unreadable} unreadable left out (spark-me data check lists them)" if unreadable else ""
    print(f"# {total.pixels} pixels of {read} images{left_out}")
    constant = [str(channel) for channel in np.flatnonzero(deviation == 0)]
    if constant:
        print(f"# channel {', '.join(constant)} (from 0) has one value everywhere: leave it out of the images")
    print("data:")
    for name, values in (("mean", total.mean), ("std", deviation)):
        print(f"  {name}: [{', '.join(f'{value:.6g}' for value in values)}]")
