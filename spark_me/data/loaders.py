"""Loaders of a run: training batches from any step on, and the held-out images."""

import signal
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from spark_me.config_schema import Config
from spark_me.data.datasets import HeldOutDataset, TrainDataset, collate
from spark_me.data.files import Files
from spark_me.data.sampler import StepSampler
from spark_me.data.transforms import held_out_transform, train_transform


def train_loader(
    files: Files,
    config: Config,
    *,
    first_step: int,
    most_unreadable: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """`Batch`es from step `first_step` to the last of the run: this process's share of each, in micro-batches."""
    dataset = TrainDataset(
        files.train,
        train_transform(config.data, config.model.image_size),
        seed=config.run.seed,
        channels=config.model.in_channels,
        repeats=config.data.repeats,
        most_unreadable=most_unreadable,
    )
    sampler = StepSampler(
        len(dataset),
        config.train.batch_size,
        config.train.epochs,
        seed=config.run.seed,
        first_step=first_step,
        rank=rank,
        world_size=world_size,
        accumulate=config.train.accumulate,
    )
    return _loader(dataset, sampler, config.data.workers, pin_memory)


def held_out_dataset(files: Files, config: Config) -> HeldOutDataset:
    """The held-out images, cropped to their centre."""
    transform = held_out_transform(config.data, config.model.image_size)
    return HeldOutDataset(files.held_out, transform, config.model.in_channels)


def held_out_loader(
    dataset: HeldOutDataset, config: Config, *, pin_memory: bool, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """`Batch`es of this process's share of the held-out images, as large as in training, the last one smaller."""
    batch_size = max(1, config.train.batch_size // (world_size * config.train.accumulate))
    sampler = BatchSampler(range(rank, len(dataset), world_size), batch_size, drop_last=False)
    return _loader(dataset, sampler, config.data.workers, pin_memory)


def _loader(
    dataset: TrainDataset | HeldOutDataset, sampler: StepSampler | BatchSampler, workers: int, pin_memory: bool
) -> DataLoader[Any]:
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
