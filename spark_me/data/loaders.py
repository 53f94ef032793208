"""Loaders of a run: training batches from any step on, and the held-out images."""

import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from spark_me.config_finetune import AnyConfig, FinetuneConfig
from spark_me.config_schema import Config, DataConfig
from spark_me.data.augment import augmentation
from spark_me.data.class_folders import Labelled
from spark_me.data.datasets import HeldOutDataset, Reader, Sample, StreamDataset, TrainDataset, collate
from spark_me.data.files import Files
from spark_me.data.labelled import LabelledTrainDataset, labelled_reader
from spark_me.data.sampler import StepSampler
from spark_me.data.shards import Shards
from spark_me.data.streams import ShardSampler
from spark_me.data.transforms import Transform, held_out_transform, train_transform
from spark_me.networks import patch_size_of


def train_loader(
    files: Files,
    config: Config,
    *,
    first_step: int,
    steps: int,
    most_unreadable: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """`Batch`es from `first_step` to the last of the run's `steps`: this process's share, in micro-batches."""
    reader = _reader(config, train_transform)
    order = _order(config, first_step, rank, world_size)
    size, data = config.train.batch_size, config.data
    if isinstance(files.train, Shards):
        stream = ShardSampler(files.train, size, steps, repeats=data.repeats, buffer=data.shuffle_buffer, **order)
        return _loader(StreamDataset(reader), stream, data.workers, pin_memory)
    dataset = TrainDataset(files.train, reader, repeats=data.repeats, most_unreadable=most_unreadable)
    return _loader(dataset, StepSampler(len(dataset), size, steps, **order), data.workers, pin_memory)


def labelled_train_loader(
    images: Labelled,
    config: FinetuneConfig,
    *,
    first_step: int,
    steps: int,
    most_unreadable: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """The same, with labels."""
    data = config.data
    reader = labelled_reader(augmentation(data, config.model.in_channels), config)
    dataset = LabelledTrainDataset(images, reader, repeats=data.repeats, most_unreadable=most_unreadable)
    order = _order(config, first_step, rank, world_size)
    sampler = StepSampler(len(dataset), config.train.batch_size, steps, copies=data.repeated_augmentation, **order)
    return _loader(dataset, sampler, data.workers, pin_memory)


def held_out_dataset(files: Files, config: Config) -> HeldOutDataset:
    """The held-out images, cropped to their centre."""
    return HeldOutDataset(files.held_out, _reader(config, held_out_transform))


def held_out_loader(
    dataset: HeldOutDataset, config: AnyConfig, *, pin_memory: bool, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """`Batch`es of this process's share of the held-out images, as large as in training, the last one smaller."""
    batch_size = max(1, config.train.batch_size // (world_size * config.train.accumulate))
    sampler = BatchSampler(range(rank, len(dataset), world_size), batch_size, drop_last=False)
    return _loader(dataset, sampler, config.data.workers, pin_memory)


def _order(config: AnyConfig, first_step: int, rank: int, world_size: int) -> dict[str, Any]:
    """What decides which samples a process gets at each step, whichever sampler hands them out."""
    return {
        "seed": config.run.seed,
        "first_step": first_step,
        "rank": rank,
        "world_size": world_size,
        "accumulate": config.train.accumulate,
        "drop_last": config.data.drop_last,
    }


def _reader(config: Config, transform: Callable[[DataConfig, Sequence[int], int, int], Transform]) -> Reader:
    data, channels = config.data, config.model.in_channels
    crop = transform(data, config.model.image_size, channels, patch_size_of(config.model.encoder))
    return Reader(crop, seed=config.run.seed, channels=channels, nodata=data.nodata)


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
