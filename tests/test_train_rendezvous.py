"""Processes that a restart put in the place of others must not meet those that are gone."""

import threading
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from spark_me.train.distributed import fresh_store


def meet(store: HashStore, world_size: int, delays: dict[int, float]) -> list[bytes]:
    """What every process reads from its fresh store after the main one has written to it."""
    read: list[bytes] = [b""] * world_size

    def process(rank: int) -> None:
        time.sleep(delays.get(rank, 0))
        fresh = fresh_store(store, rank, world_size)
        if rank == 0:
            assert not fresh.check(["address"])
            fresh.set("address", f"life {time.monotonic_ns()}")
        read[rank] = fresh.get("address")

    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    return read


@pytest.mark.parametrize("late", [0, 2], ids=["the main one is late", "another is late"])
def test_each_life_meets_itself(tmp_path: Path, late: int) -> None:
    store = HashStore()
    lives = [meet(store, 3, delays) for delays in ({}, {late: 0.3}, {1: 0.1})]
    assert all(len(set(read)) == 1 and read[0] for read in lives)
    assert len({read[0] for read in lives}) == 3
