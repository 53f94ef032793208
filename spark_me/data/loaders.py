"""Going over the images of a run in worker processes: training batches from any step on, or each image once."""

import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from tqdm import tqdm

from spark_me.config.data import DataConfig, FinetuneDataConfig
from spark_me.config.tasks import ModelConfig
from spark_me.data.class_folders import Labelled
from spark_me.data.datasets import (
    CachingReader,
    HeldOutDataset,
    LabelledTestDataset,
    LabelledTrainDataset,
    Masks,
    Reader,
    Sample,
    StreamDataset,
    TrainDataset,
    collate,
)
from spark_me.data.files import evenly_spaced
from spark_me.data.reading import Encoded, Item, Items
from spark_me.data.sampler import Share, StepSampler
from spark_me.data.shards import Shards
from spark_me.data.streams import ShardSampler
from spark_me.data.transforms import (
    LabelledTransform,
    Transform,
    augmentation,
    centre_crop,
    held_out_transform,
    train_transform,
)
from spark_me.errors import UserError, shown
from spark_me.masking import grid_of
from spark_me.networks import patch_size_of

T = TypeVar("T")
AHEAD = 2
"""Images that each worker has before it, torch's default."""
DEATH = re.compile(r"DataLoader worker \(pid.*?\)[^.\n]*")
"""torch raises it with no type of its own; the first one anywhere, from a signal handler."""


def visit(
    images: Items | Shards, function: Callable[[Item], T], *, workers: int, what: str, sample: int | None = None
) -> Iterator[T]:
    """What a function makes of each image, in their order, with a progress bar.

    Args:
        images: in any order, or in shards.
        function: runs in the workers.
        workers: processes; 0 for none besides this one.
        what: for the bar.
        sample: how many images to take, evenly spaced, of shards the first; all when None.

    Raises:
        UserError: if a worker dies, naming the images that the workers had before them.
    """
    number = len(images) if sample is None else min(sample, len(images))
    keys: Any
    if isinstance(images, Shards):  # its images travel to the workers, others are read there
        keys, dataset = _Once(islice(images, sample)), _Applied(None, function)
    else:
        keys, dataset = evenly_spaced(len(images), number), _Applied(images, function)
    results = DataLoader(
        dataset,
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    done = 0
    try:
        for result in tqdm(results, desc=what, total=number, unit="image", disable=None):
            yield result
            done += 1
    except RuntimeError as error:
        death = death_of_worker(error)
        if death is None:
            raise
        pending = [] if isinstance(images, Shards) else keys[done : done + workers * AHEAD]
        names = ", ".join(shown(images[key]) for key in pending)  # type: ignore[index]
        raise UserError(
            f"{death} {what} the images after the first {done}: one of these may be what it died of: "
            f"{names or 'those of the next shard'}; or take data.workers=0"
        ) from None


def death_of_worker(error: RuntimeError) -> str | None:
    """That and how a worker process died, if that is what torch's error says; an error that one raised is none."""
    if str(error).startswith("Caught "):
        return None
    # The cause knows the signal, where there is one.
    found = [match[0] for one in (error.__cause__, error) if (match := DEATH.search(str(one)))]
    if not found:
        return None
    memory = ", perhaps for want of memory" if "signal: Killed" in found[0] else ""
    return f"a process that loads images died ({found[0].rstrip()}){memory}:"


class _Applied(Dataset[T], Generic[T]):
    def __init__(self, images: Items | None, function: Callable[[Item], T]) -> None:
        self.images = images
        self.function = function

    def __getitem__(self, key: int | Encoded) -> T:
        return self.function(key if self.images is None else self.images[key])  # type: ignore[arg-type,index]


class _Once:
    """An iterator as a sampler."""

    def __init__(self, values: Iterator[Encoded]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Encoded]:
        return self._values


def _as_it_is(value: T) -> T:
    return value


def train_reader(data: DataConfig, model: ModelConfig, seed: int) -> Reader:
    """Draws the crops that a model is pretrained on, with their masks."""
    masks = Masks(grid_of(model.image_size, patch_size_of(model.encoder)), model.mask_ratio)
    return _reader(partial(train_transform, as_bytes=True), data, model, seed, masks)


def held_out_dataset(images: Items, data: DataConfig, model: ModelConfig, seed: int) -> HeldOutDataset:
    """Images cropped to their centre."""
    return HeldOutDataset(images, _reader(held_out_transform, data, model, seed))


def _reader(
    transform: Callable[..., Transform], data: DataConfig, model: ModelConfig, seed: int, masks: Masks | None = None
) -> Reader:
    crop = transform(data, model.image_size, model.in_channels, patch_size_of(model.encoder))
    channels, nodata = model.in_channels, data.nodata
    return Reader(crop, seed=seed, channels=channels, nodata=nodata, masks=masks, reduction=crop.reduction)


def labelled_train_reader(data: FinetuneDataConfig, channels: int, seed: int) -> Reader:
    """Draws the crops that a classifier is trained on."""
    return _labelled_reader(augmentation(data, channels), data, channels, seed)


def labelled_test_dataset(images: Labelled, data: FinetuneDataConfig, channels: int, seed: int) -> LabelledTestDataset:
    """Labelled images under the test crop."""
    return LabelledTestDataset(images, _labelled_reader(centre_crop(data, channels), data, channels, seed))


def _labelled_reader(transform: LabelledTransform, data: FinetuneDataConfig, channels: int, seed: int) -> Reader:
    if data.cache:
        return CachingReader(transform, seed=seed, channels=channels)
    return Reader(transform, seed=seed, channels=channels, reduction=transform.reduction)


def train_loader(
    images: Items | Shards, reader: Reader, data: DataConfig, share: Share, *, most_unreadable: int, pin_memory: bool
) -> DataLoader[Any]:
    """`Batch`es of crops of unlabelled images: a process's share of a run, in micro-batches."""
    if isinstance(images, Shards):
        stream = ShardSampler(images, share, repeats=data.repeats, buffer=data.shuffle_buffer)
        return _loader(StreamDataset(reader), stream, data.workers, pin_memory)
    dataset = TrainDataset(images, reader, repeats=data.repeats, most_unreadable=most_unreadable)
    return _loader(dataset, StepSampler(len(dataset), share), data.workers, pin_memory)


def labelled_train_loader(
    images: Labelled, reader: Reader, data: FinetuneDataConfig, share: Share, *, most_unreadable: int, pin_memory: bool
) -> DataLoader[Any]:
    """The same, with labels."""
    dataset = LabelledTrainDataset(images, reader, repeats=data.repeats, most_unreadable=most_unreadable)
    sampler = StepSampler(len(dataset), share, copies=data.repeated_augmentation)
    return _loader(dataset, sampler, data.workers, pin_memory)


def held_out_loader(
    dataset: HeldOutDataset, batch_size: int, workers: int, *, pin_memory: bool, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """`Batch`es of this process's share of the held-out images, the last one smaller."""
    sampler = BatchSampler(range(rank, len(dataset), world_size), batch_size, drop_last=False)
    return _loader(dataset, sampler, workers, pin_memory)


def _loader(dataset: Dataset[Sample], sampler: Sampler[Any], workers: int, pin_memory: bool) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=pin_memory,
        # Its own generator: starting workers must not draw from the one that training draws from.
        generator=torch.Generator(),
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    # A cluster signals every process of a job. Workers have to live until the trainer's last step is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
