"""Where processes meet. torchrun keeps one store over restarts, with the addresses of processes that are gone."""

import hashlib
import time
import uuid

from torch.distributed import PrefixStore, Store

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
