"""Which process this is. One process is rank 0 of 1; torch.distributed, once initialised, says otherwise."""

import torch.distributed as dist


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the run directory."""
    return rank() == 0
