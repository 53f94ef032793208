"""Which images of shards each step sees. One reader a process hands them to the workers, whatever their number."""

import queue
import random
import threading
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import TypeVar

import torch
from torch.utils.data import Sampler

from spark_me.data.reading import Encoded
from spark_me.data.sampler import ORDER, SHUFFLE, Share, generator_of, seed_of, steps_of_epoch
from spark_me.data.shards import Shards, Stored
from spark_me.errors import UserError

Key = tuple[int, int, Encoded]
"""(epoch, sample index, image)."""
T = TypeVar("T")
BATCHES_AHEAD = 2
"""Batches that are read while training, besides those that the workers have."""


class ShardSampler(Sampler[list[Key]]):
    """This process's micro-batches from one step to the last of the run.

    Every epoch is a new order of the shards. Each process takes every world_size-th of them, reads them one after the
    other, and draws their images from a buffer; a process whose shards are read before the epoch ends begins them
    again. A sample's index is made of the pass, its shard's place and its place in the shard, whenever it is read.
    """

    def __init__(self, shards: Shards, share: Share, *, repeats: int, buffer: int) -> None:
        """
        Args:
            shards: at least as many as processes.
            share: this process's; of the epoch's steps before its first, only the order of the images is made again
                where the shards are local and not compressed, else they are read again and dropped.
            repeats: passes over the shards that make one epoch.
            buffer: images that the next one is drawn from.

        Raises:
            UserError: if there are fewer shards than processes.
        """
        if len(shards.urls) < share.world_size:
            raise UserError(
                f"data.root: {len(shards.urls)} shards cannot be split over {share.world_size} processes: start fewer, "
                "or make more and smaller shards"
            )
        self.shards = shards
        self.share = share
        self.images = share.batch_size // share.world_size
        """Of a step, in this process."""
        self.steps_per_epoch = steps_of_epoch(len(shards) * repeats, share.batch_size, drop_last=share.drop_last)
        self.buffer = buffer

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[list[Key]]:
        return read_ahead(self._batches(), BATCHES_AHEAD)

    def _batches(self) -> Iterator[list[Key]]:
        share = self.share
        epoch, skipped = divmod(share.first_step, self.steps_per_epoch)
        for step in range(share.first_step, share.steps):
            if step == share.first_step or step % self.steps_per_epoch == 0:
                epoch = step // self.steps_per_epoch
                if skipped and share.rank == 0:
                    print(f"going past {skipped * self.images} images of epoch {epoch + 1} to where the run was")
                images = self._from(epoch, skipped * self.images)
                skipped = 0
            for _ in range(share.accumulate):
                yield [(epoch, index, image) for index, image in islice(images, self.images // share.accumulate)]

    def _from(self, epoch: int, first: int) -> Iterator[tuple[int, Encoded]]:
        """Endless (index, image) of an epoch, from its `first` on."""
        passing = True
        images = self._shuffled(epoch, lambda: passing)
        # The buffer's content depends on all that came before, but not on what these images hold.
        next(islice(images, first, first), None)
        passing = False
        for index, image in images:
            yield index, image.read() if isinstance(image, Stored) else image

    def _shuffled(self, epoch: int, later: Callable[[], bool]) -> Iterator[tuple[int, Encoded | Stored]]:
        """Endless (index, image) of an epoch; `later` as of `Shards.read`."""
        from webdataset import shuffle

        order = torch.randperm(len(self.shards.urls), generator=generator_of(ORDER, self.share.seed, epoch)).tolist()
        own = order[self.share.rank :: self.share.world_size]
        draws = random.Random(seed_of(SHUFFLE, self.share.seed, epoch, self.share.rank))
        for number in count():
            empty = True
            for image in shuffle(self.buffer, initial=self.buffer, rng=draws)(self._in_order(own, number, later)):
                empty = False
                yield image
            if empty:
                raise UserError(
                    f"data.root: no images in {len(own)} shards, the first of which is {self.shards.urls[own[0]]}: "
                    f"check data.image_key={self.shards.image_key}"
                )

    def _in_order(
        self, own: list[int], number: int, later: Callable[[], bool]
    ) -> Iterator[tuple[int, Encoded | Stored]]:
        for shard in own:
            for place, image in enumerate(self.shards.read(shard, later)):
                yield ((number * len(self.shards.urls) + shard) << 32) + place, image


def read_ahead(values: Iterator[T], most: int) -> Iterator[T]:
    """Run an iterator in a thread of its own, at most so many values ahead; its errors are raised here."""
    done = object()
    stop = threading.Event()
    waiting: queue.Queue = queue.Queue(most)

    def put(value: object) -> bool:
        while not stop.is_set():
            try:
                waiting.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for value in values:
                if not put(value):
                    return
            put(done)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (value := waiting.get()) is not done:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
