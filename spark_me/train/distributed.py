"""Several processes that train one model: who is who, and how they agree. torchrun starts them; alone, all is free."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spark_me.errors import UserError
from spark_me.train.failures import first_line
from spark_me.train.rendezvous import fresh_store

T = TypeVar("T")

PATIENCE = timedelta(minutes=60)
"""Longest that a process waits for the others, of which one may be listing files or drawing."""


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this process writes the run directory and speaks."""
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that torchrun started; nothing without torchrun.

    Raises:
        UserError: if they cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # Tensors on the CPU, which carry what processes agree on, go by gloo, and never wait for a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = fresh_store(store, rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the other processes cannot be reached ({first_line(error)}): start with torchrun") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def shared(error: UserError) -> BaseException:
    """What to raise for an error that all processes have: the main one reports it, the others leave silently."""
    return error if is_main() else SystemExit(error.exit_code)


@contextmanager
def agreed() -> Iterator[None]:
    """A block without communication that may fail on any process: if it fails on one, all stop behind it.

    Raises:
        UserError: on the main process, the error of the first process that has one.
        SystemExit: then on the others, so that it is reported once.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        if not _together():
            raise
        own = error
    if total(own is not None)[0]:
        raise shared(everyones([] if own is None else [own])[0]) from None


def total(*values: float) -> tuple[float, ...]:
    """Sums over all processes, in float64."""
    if not _together():
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return tuple(sums.tolist())


def everyones(own: Sequence[T]) -> list[T]:
    """The items of all processes, by rank."""
    if not _together():
        return list(own)
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, list(own))
    return [item for items in gathered for item in items]


def of_main(value: T) -> T:
    """The main process's value, on every process."""
    if not _together():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
