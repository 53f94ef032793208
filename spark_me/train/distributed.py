"""The processes of a run and their devices: who is who, how they agree, what they compute in, what breaks outside."""

import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store

from spark_me.data.loaders import death_of_worker
from spark_me.data.unreadable import UnreadableFiles
from spark_me.devices import cpu_multiplies_bfloat16, device_name, float32_products, pick_device
from spark_me.errors import UserError, first_line


@contextmanager
def named_failures() -> Iterator[None]:
    """Turn torch's errors about other processes into one line that says how to go on.

    Raises:
        UserError: in place of such a RuntimeError; others pass.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        death = death_of_worker(error)
        if death is not None:
            raise UserError(
                f"{death} repeat the command to go on from the last checkpoint, with fewer data.workers if it happens "
                "again; spark-me data check names what a decoder dies of"
            ) from None
        # torch raises some of them with no type of their own.
        if isinstance(error, DistError) or "gloo" in text:
            raise UserError(
                f"another process of this run was lost ({first_line(error)}): what it said last tells why; repeat the "
                "command to go on from the last checkpoint"
            ) from None
        raise


INTERVAL = 0.05
"""Seconds between looks at the store."""


def fresh_store(store: Store, rank: int, world_size: int) -> Store:
    """A part of a store that is these processes' own: nothing in it is from those that they replace.

    Every process gives itself a name. The main one proposes the names that it finds, which may be old, until every
    process has confirmed a proposal; a process confirms those with its own name only.
    """
    own = uuid.uuid4().hex
    store.set(f"name/{rank}", own)
    return PrefixStore(_propose(store, world_size) if rank == 0 else _confirm(store, rank, own), store)


def _propose(store: Store, world_size: int) -> str:
    while True:
        names = " ".join(store.get(f"name/{rank}").decode() for rank in range(world_size))
        proposal = hashlib.sha256(names.encode()).hexdigest()
        store.set(f"names/{proposal}", names)
        store.set("proposal", proposal)
        if all(store.check([f"confirmed/{proposal}/{rank}"]) for rank in range(1, world_size)):
            store.set(f"settled/{proposal}", "")
            return proposal
        time.sleep(INTERVAL)


def _confirm(store: Store, rank: int, own: str) -> str:
    while True:
        proposal = store.get("proposal").decode()
        if own.encode() in store.get(f"names/{proposal}"):
            store.set(f"confirmed/{proposal}/{rank}", "")
            if store.check([f"settled/{proposal}"]):
                return proposal
        time.sleep(INTERVAL)


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
def raise_together() -> Iterator[None]:
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
    if all_reduce(own is not None)[0]:
        raise first_of_all(own) from None


def first_of_all(own: UserError | None) -> BaseException:
    """What to raise where some process has an error: the main one reports the first, the others leave silently."""
    return shared(all_gather([] if own is None else [own])[0])


def all_reduce(*values: float) -> tuple[float, ...]:
    """Sums over all processes, in float64."""
    if not _together():
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return tuple(sums.tolist())


def all_gather(own: Sequence[T]) -> list[T]:
    """The items of all processes, by rank."""
    if not _together():
        return list(own)
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, list(own))
    return [item for items in gathered for item in items]


def broadcast(value: T) -> T:
    """The main process's value, on every process."""
    if not _together():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def common_store() -> Store | None:
    """What the processes of a run can leave each other without meeting; None for a single one."""
    return dist.distributed_c10d._get_default_store() if _together() else None


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

IN_FLOAT32 = "this CPU has no products of bfloat16 (AVX-512 or AMX): it computes in float32"

SMALLEST_SCALE = 1e-4
"""Of fp16's loss: below it no gradient is left to save, the run diverges."""


class Precision:
    """`train.precision` on a device.

    Attributes:
        remark: what is otherwise than asked for, for people; empty if nothing is.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """
        Raises:
            UserError: if the device cannot compute so.
        """
        if name == "tf32" and device.type != "cuda":
            raise UserError(f"train.precision=tf32 needs a CUDA GPU, not {device}: use fp32 or bf16")
        self.name = name
        self.device = device
        # Elsewhere torch has loops for them, many times slower than float32 (docs/benchmarks.md).
        in_float32 = name == "bf16" and device.type == "cpu" and not cpu_multiplies_bfloat16()
        self.remark = f"{IN_FLOAT32}, as train.precision=fp32" if in_float32 else ""
        enabled = name in AUTOCAST and not in_float32
        self.autocast = torch.autocast(device.type, AUTOCAST.get(name, torch.bfloat16), enabled=enabled)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def products(self) -> AbstractContextManager:
        """Within, float32 products on a GPU take TF32 for tf32, and are float32's own for fp32."""
        return float32_products(tf32=self.name == "tf32") if self.device.type == "cuda" else nullcontext()


def device_of_process(name: str) -> torch.device:
    """The device of this process for `run.device`: of several processes on a machine, each takes its own GPU.

    Raises:
        UserError: if there is no such device, or fewer GPUs than processes.
    """
    name = device_name(name)
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    advice = "use run.device=auto or cpu, and no more processes on a machine than it has GPUs"
    device = pick_device(name, "run.device=", advice)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def note_unreadable(unreadable: UnreadableFiles, records: list[tuple[str, str]]) -> None:
    """Note every process's (path, reason), so that all come to the same list.

    Raises:
        UserError: if there are more than accepted.
    """
    if all_reduce(len(records))[0]:
        note_gathered(unreadable, records)


def note_gathered(unreadable: UnreadableFiles, records: list[tuple[str, str]]) -> None:
    """The same, where it is known that some process has any."""
    records = all_gather(records)
    with raise_together():
        unreadable.add(records)
