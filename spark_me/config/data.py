"""The section `data`: its keys with type, default, meaning and range."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

# Key, whether its value is good, what it has to be.
Rule = tuple[str, bool, str]

FILE_KINDS = ("images", "imagefolder", "imagenet", "list")
DATA_KINDS = (*FILE_KINDS, "webdataset", "huggingface", "demo")
INTERPOLATIONS = ("bicubic", "bilinear")
LARGEST_AREA = 1 << 22
"""Pixels of an image that a network sees: 2048 × 2048. A stranger's checkpoint says how large its images are, too."""
PIPE = "pipe:"
"""What a shard begins with that is the output of a command."""
_MAY_BE_PIPE = re.compile(r"pipe:|[^/]*[{\\$].*:", re.DOTALL)
"""Of one of several patterns; braces, backslashes and variables may hide how the names begin."""
# Mean and deviation of ImageNet in RGB, and of their average.
STATISTICS = {3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), 1: ([0.449], [0.226])}


class Statistics(Protocol):
    """Mean and deviation of each channel; None for ImageNet's."""

    mean: list[float] | None
    std: list[float] | None


@dataclass
class ImagesConfig:
    """What the images of every task have in common."""

    repeats: int = 1
    """How many crops of each image make one epoch; more than 1 is for data sets of a few images. Example: 16."""
    drop_last: bool = True
    """Leave out the images at an epoch's end that are no whole batch; false: fill their batch up, with the first images
    of the epoch, as the published recipes do."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    draft: bool = True
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size where the random crop still has as many pixels as it is resized to;
    false: always wholly. Which crops are drawn does not depend on it, their pixels do slightly."""
    interpolation: str = "bicubic"
    """How images are resized: bicubic or bilinear, antialiased."""
    workers: int = 4
    """Processes that load images, for each that trains; 0 loads in that itself. The result does not depend on it."""
    max_unreadable: float = 0.01
    """Share of the images that may be unreadable (skipped and listed) before the run stops."""
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Smallest and largest share of an image's area that a random crop takes."""

    def common_rules(self) -> Iterator[Rule]:
        """Range checks of these keys."""
        yield "data.repeats", self.repeats >= 1, "must be at least 1"
        scale = self.crop_scale
        good = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        yield "data.crop_scale", good, "must be [smallest, largest] in (0, 1]"
        yield "data.flip", 0 <= self.flip <= 1, "must be a probability"
        yield "data.interpolation", self.interpolation in INTERPOLATIONS, f"must be one of {', '.join(INTERPOLATIONS)}"
        yield "data.workers", self.workers >= 0, "must not be negative"
        yield "data.max_unreadable", 0 <= self.max_unreadable < 1, "must be a share in [0, 1)"


@dataclass
class DataConfig(ImagesConfig):
    """The images. Nothing here needs labels."""

    kind: str = "images"
    """What root is: images, imagefolder, imagenet, list, webdataset, huggingface or demo. images: a folder at any
    depth. imagefolder: one folder a class. imagenet: ImageNet's layout, train/ and val/ in root. list: a text file of
    paths. webdataset: tar shards. huggingface: a data set of its hub, or one saved with save_to_disk. demo: none, the
    photos are scikit-image's. Example: webdataset."""
    root: str | None = None
    """Where the images are: the folder; the text file for kind list (its paths are relative to it); shards with brace
    patterns for kind webdataset, local or `pipe:COMMAND` (see allow_pipe); the name or folder for kind huggingface;
    null for kind demo. Example: /path/to/images."""
    allow_pipe: bool = False
    """Let `pipe:COMMAND` in root run its command. Only for the command line: no file may set it, and a run that goes on
    needs it again."""
    val_root: str | None = None
    """Another root whose images are held out of training to measure the loss on. Shards must be local; null for kinds
    imagenet, huggingface and demo. Example: /path/to/other/images."""
    split: str = "train"
    """Which split of a huggingface data set is trained on."""
    val_split: str | None = None
    """Which split of a huggingface data set is held out; null: none. Example: validation."""
    held_out: int = 0
    """Without val_root and val_split: how many images of root, evenly spaced in their order, are held out. For kind
    imagenet: how many of val/, 0 for all. Example: 8."""
    image_key: str | None = None
    """Which part of a sample is the image: an extension (webdataset) or a column (huggingface); null: the first one.
    Example: jpg."""
    samples: int | None = None
    """Images in all shards of root together; null counts them at the start, which pipes do not allow.
    Example: 1281167."""
    shuffle_buffer: int = 1000
    """Shards are read in a random order, and their images are drawn from a buffer of so many; 1 keeps their order."""
    crop_scale: list[float] = field(default_factory=lambda: [0.67, 1.0])
    mean: list[float] | None = None
    """Mean of each channel, which is subtracted; null: ImageNet's, for RGB and grey alone. 8-bit and 16-bit values
    count from 0 to 1, others as they are. `spark-me data stats` measures it. Example: [0.5, 0.5, 0.5]."""
    std: list[float] | None = None
    """Deviation of each channel, by which the difference is divided; null as for mean. Example: [0.25, 0.25, 0.25]."""
    nodata: float | None = None
    """The value, as stored, of pixels that hold none: a number where all channels have it, or nan where any has it.
    Patches with such a pixel are neither visible nor reconstructed. null: all pixels count.
    Example: -9999."""

    def rules(self, channels: int) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        yield "data.kind", self.kind in DATA_KINDS, f"must be one of {', '.join(DATA_KINDS)}"
        yield from self._place_rules()
        yield from self.common_rules()
        yield from statistics_rules("data.mean", self.mean, channels)
        yield from statistics_rules("data.std", self.std, channels)

    def _place_rules(self) -> Iterator[Rule]:
        """Where the images are."""
        demo, shards, hub = (self.kind == kind for kind in ("demo", "webdataset", "huggingface"))
        yield "data.root", demo or bool(self.root), "must name your images: add data.root=/path/to/images"
        yield "data.root", not demo or self.root is None, "must be null for data.kind=demo, which has its own photos"
        own = self.kind in ("demo", "imagenet", "huggingface")
        yield "data.val_root", not own or self.val_root is None, f"must be null for data.kind={self.kind}"
        pipe = self.val_root is not None and may_run_commands(self.val_root)
        yield "data.val_root", not pipe, "must be local shards, which can be read in any order"
        yield "data.split", hub or self.split == "train", "is for data.kind=huggingface"
        yield "data.val_split", hub or self.val_split is None, "is for data.kind=huggingface"
        yield "data.held_out", self.held_out >= 0, "must not be negative"
        exclusive = demo or self.val_root is not None or self.val_split is not None
        yield "data.held_out", not (exclusive and self.held_out), "must be 0 with val_root, val_split or data.kind=demo"
        whole = "must be 0 for shards: hold out whole ones by data.val_root"
        yield "data.held_out", not (shards and self.held_out), whole
        yield "data.image_key", self.image_key is None or shards or hub, "is for data.kind=webdataset and huggingface"
        yield "data.samples", self.samples is None or shards, "is for data.kind=webdataset"
        yield "data.samples", self.samples is None or self.samples >= 1, "must be null or at least 1"
        pipe = shards and may_run_commands(self.root or "")
        counted = not pipe or self.samples is not None
        yield "data.samples", counted, "must say how many images the shards hold, as pipes cannot be counted beforehand"
        allowed = (
            "must be true, as data.root runs commands: read them, then add data.allow_pipe=true on the command line"
        )
        yield "data.allow_pipe", not pipe or self.allow_pipe, allowed
        yield "data.shuffle_buffer", self.shuffle_buffer >= 1, "must be at least 1"


@dataclass
class FinetuneDataConfig(ImagesConfig):
    """Labelled images: one folder a class. The sorted names of the folders are the classes."""

    root: str | None = None
    """The folder above train/ and val/, ImageNet's layout; with val_root, that of the training images itself."""
    val_root: str | None = None
    """The class folders of the images that accuracy is measured on, if they are not in root/val."""
    fraction: float = 1.0
    """Share of the training images that is used: of each class alike, at least one, drawn by run.seed. Example: 0.1."""
    repeated_augmentation: int = 1
    """Different crops of an image that a batch holds. An epoch is not longer for it: it has fewer of the images.
    Example: 3."""
    train_crop: int | None = None
    """Side of the training images in pixels; null: as the checkpoint in weights was trained on, or 224 where that is
    none of spark_me. Example: 192."""
    trivial_augment: bool = False
    """TrivialAugmentWide: one random change of shape or colour, of random strength. For RGB and grey alone."""
    erasing: float = 0.0
    """Probability that a rectangle of 0.02 to 1/3 of a crop becomes noise. Example: 0.25."""
    test_resize: int | None = None
    """What the shorter edge of a test image is resized to, in pixels; null: test_crop / 0.95. Example: 236."""
    test_crop: int | None = None
    """Side of the centre of it that the network sees; null: train_crop. Example: 224."""
    mean: list[float] | None = None
    """Mean of each channel, which is subtracted; null: as for the checkpoint in weights, or ImageNet's where that is
    none of spark_me. 8-bit and 16-bit values count from 0 to 1, others as they are. `spark-me data stats` measures it.
    Example: [0.5, 0.5, 0.5]."""
    std: list[float] | None = None
    """Deviation of each channel, by which the difference is divided; null as for mean. Example: [0.25, 0.25, 0.25]."""
    cache: bool = False
    """Keep every decoded image in memory, in each worker; for small data sets."""

    def rules(self, channels: int) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        yield "data.root", bool(self.root), "must name your images: add data.root=/path/to/folder/above/train/and/val"
        yield "data.fraction", 0 < self.fraction <= 1, "must be a share in (0, 1]"
        yield "data.repeated_augmentation", self.repeated_augmentation >= 1, "must be at least 1; 1 for none"
        yield from self.common_rules()
        largest = math.isqrt(LARGEST_AREA)
        crop = self.train_crop
        yield "data.train_crop", crop is None or 1 <= crop <= largest, f"must be null or in [1, {largest}]"
        colours = not self.trivial_augment or channels in (1, 3)
        yield "data.trivial_augment", colours, f"must be false for model.in_channels={channels}: it changes colours"
        yield "data.erasing", 0 <= self.erasing <= 1, "must be a probability"
        resize, crop = self.test_resize, self.test_crop
        yield "data.test_resize", resize is None or 1 <= resize <= largest, f"must be null or in [1, {largest}]"
        fits = crop is None or 1 <= crop <= (crop if resize is None else resize)
        yield "data.test_crop", fits, "must be null, or lie between 1 and data.test_resize"
        # What is null is settled by the weights.
        for key, values in (("data.mean", self.mean), ("data.std", self.std)):
            if values is not None:
                yield from statistics_rules(key, values, channels)


def may_run_commands(root: str) -> bool:
    """Whether any of the shards that a pattern stands for may begin with `pipe:`, however it is written."""
    return any(_MAY_BE_PIPE.match(part) for part in root.split("::"))  # as webdataset splits it


def statistics_of(data: Statistics, channels: int) -> tuple[list[float] | None, list[float] | None]:
    """Mean and deviation per channel, given or ImageNet's; None where it has none for so many channels."""
    mean, std = STATISTICS.get(channels, (None, None))
    return data.mean if data.mean is not None else mean, data.std if data.std is not None else std


def statistics_rules(key: str, values: list[float] | None, channels: int) -> Iterator[Rule]:
    """Whether mean or deviation have a value for every channel."""
    measure = "measure it by `spark-me data stats YOUR.yaml`"
    known = values is not None or channels in (1, 3)
    yield key, known, f"must have model.in_channels={channels} values: {measure}"
    yield key, values is None or len(values) == channels, f"must have model.in_channels={channels} values: {measure}"
    positive = key != "data.std" or values is None or all(value > 0 for value in values)
    yield key, positive, "must be positive"
