"""Going once over the images of a run, in its worker processes."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from spark_me.data.files import evenly_spaced
from spark_me.data.reading import Encoded, Item, Items
from spark_me.data.shards import Shards

T = TypeVar("T")


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
    yield from tqdm(results, desc=what, total=number, unit="image", disable=None)


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
