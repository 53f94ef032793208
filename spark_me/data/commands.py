"""`spark-me data check`, `stats` and `digits`: what cannot be used, channel statistics, and a small real data set."""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spark_me.config.data import DataConfig, statistics_of
from spark_me.config.tasks import PretrainConfig
from spark_me.data import arrays
from spark_me.data.files import find_files
from spark_me.data.loaders import visit
from spark_me.data.reading import Item, decode, read_image, to_picture
from spark_me.data.sampler import SUBSET, generator_of
from spark_me.data.transforms import require_moderate
from spark_me.data.unreadable import UnreadableImage, as_lines
from spark_me.errors import UserError, install_text, printable
from spark_me.files import atomic_write, check_output, write_json, write_text, writing

COMMONEST = 5
"""Kinds of images that the summary names."""


class Found(NamedTuple):
    """What an image is."""

    name: str = ""
    """Empty where readable, of which there may be millions."""
    reason: str | None = None
    """Why it is unreadable."""
    height: int = 0
    width: int = 0
    stored_as: str = ""
    """Pillow's mode, or channels and type."""


def check(config: PretrainConfig, out: Path | None) -> int:
    """Open the training and the held-out images, print or write a list, and print a summary.

    Returns:
        1 if any is unreadable, else 0.

    Raises:
        UserError: if there are no images, or the list cannot be written.
    """
    check_output(out, str(config.data.root))  # which may be a list of files itself
    channels = config.model.in_channels
    function = partial(examine, channels=channels, data=config.data)
    found: list[Found] = []
    for images in find_files(config.data, channels):
        if len(images):
            found += visit(images, function, workers=config.data.workers, what="checking")
    unreadable = sorted((image.name, image.reason) for image in found if image.reason is not None)
    if out is None:
        for name, reason in unreadable:
            print(f"{printable(name)}\t{printable(reason)}")
    else:
        write_text(out, as_lines(unreadable))
    print(_summary([image for image in found if image.reason is None], len(unreadable)))
    return 1 if unreadable else 0


def examine(item: Item, channels: int, data: DataConfig) -> Found:
    """Read one image as training would."""
    try:
        decoded = decode(item, channels)
        picture = to_picture(decoded, channels, data.nodata)
        if isinstance(picture, Tensor):
            if picture.isnan().all():
                raise UnreadableImage("nodata: no pixel has data")
            statistics = statistics_of(data, channels)
            if all(values is not None and len(values) == channels for values in statistics):
                mean, std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
                require_moderate(((picture - mean) / std).nan_to_num(0), picture)
    except UnreadableImage as reason:
        return Found(str(item), str(reason))
    height, width = picture.shape[1:] if isinstance(picture, Tensor) else (picture.height, picture.width)
    if isinstance(decoded, np.ndarray):
        return Found("", None, height, width, f"{decoded.shape[2]}×{decoded.dtype}")
    return Found("", None, height, width, decoded.mode)


def _summary(images: list[Found], unreadable: int) -> str:
    summary = f"{len(images) + unreadable} images, {unreadable} unreadable"
    if not images:
        return summary
    sizes = sorted(((image.height, image.width) for image in images), key=lambda size: size[0] * size[1])
    smallest, median, largest = (sizes[place] for place in (0, len(sizes) // 2, -1))
    size = " / ".join(f"{height}×{width}" for height, width in (smallest, median, largest))
    kinds = Counter(image.stored_as for image in images)
    named = ", ".join(f"{kind} ({number})" for kind, number in kinds.most_common(COMMONEST))
    more = f" and {len(kinds) - COMMONEST} more" if len(kinds) > COMMONEST else ""
    return f"{summary}; height×width smallest / median / largest {size}; stored as {named}{more}"


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


def stats(config: PretrainConfig, sample: int | None, out: Path | None) -> None:
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


SIDE = 64
"""Pixels along a side of the images that are written."""
VALIDATION_SHARE = 0.2
BRIGHTEST = 16
"""Largest value of the original images."""


def write_digits(folder: Path) -> None:
    """Write FOLDER/train/0 to FOLDER/val/9 with grey PNGs, a fifth of every digit in val; the same on every machine.

    Raises:
        UserError: if scikit-learn is missing, or the folder cannot be written to.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(f"the digits come with scikit-learn: {install_text('demo')}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    for split, label, place in tqdm(list(_split(digits.target)), desc="writing digits", leave=False, disable=None):
        path = folder / split / str(label) / f"{place:04d}.png"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            with atomic_write(path) as file:
                _enlarge(digits.images[place]).save(file, format="png")
    print(f"{len(digits.target)} images of {len(digits.target_names)} digits in {folder}")


def _split(targets: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """(split, digit, place among all images) of every image."""
    for label in range(10):
        own = np.flatnonzero(targets == label)
        held_out = round(VALIDATION_SHARE * len(own))
        order = torch.randperm(len(own), generator=generator_of(SUBSET, 0, 0, label)).tolist()
        for rank, index in enumerate(order):
            yield "val" if rank < held_out else "train", label, int(own[index])


def _enlarge(image: np.ndarray) -> Image.Image:
    grey = np.round(image * (255 / BRIGHTEST)).astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
