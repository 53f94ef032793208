"""Going once over the images of a run, in its worker processes."""

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from spark_me.data.files import evenly_spaced
from spark_me.data.reading import Encoded, Item, Items
from spark_me.data.shards import Shards
from spark_me.errors import UserError, shown

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
