"""The largest batch whose forward and backward pass fits into a GPU's memory."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spark_me.benchmark.case import Case
from spark_me.benchmark.timing import Advance
from spark_me.benchmark.trial import first_line, is_out_of_memory, release_memory
from spark_me.benchmark.workloads import Variant, Workload, variants_of
from spark_me.errors import EngineError, UserError
from spark_me.machine import Machine, describe_machine

STEP = 8
"""Batches are tried in multiples of this."""


@dataclass(frozen=True)
class LargestBatch:
    """Of one backend."""

    backend: str
    memory_format: str | None
    batch: int
    """0 if not even the smallest fits."""
    limit: str
    """What stopped the next larger one."""


@dataclass(frozen=True)
class LargestBatches:
    """Of several backends, none compiled: a compiler would start anew with every batch."""

    machine: Machine
    case: Case
    """Its batch is where the search began."""
    scope: str
    gpu_bytes: int
    """Memory of the GPU."""
    largest: list[LargestBatch]


def find_largest_batches(
    case: Case, scope: str, backends: Sequence[str], advance: Advance = lambda label: None
) -> LargestBatches:
    """Search for the largest batch of each backend, dense ones in channels_last.

    Weights and their gradients are in memory too, an optimizer is not.

    Args:
        case: what is computed; the search begins at its batch.
        scope: "encoder" or "step".
        backends: of `BACKENDS`.
        advance: told each batch before it is tried.

    Raises:
        UserError: for a case that does not fit, and on a CPU.
    """
    case.check([scope])
    if case.device != "cuda":
        raise UserError("--largest-batch asks how much fits into a GPU: add --device cuda")
    variants = [variant for variant in variants_of(backends) if variant.memory_format != "contiguous"]
    largest = [_largest_of(case, scope, variant, advance) for variant in variants]
    with case.computing():
        machine = describe_machine(case.device)
    return LargestBatches(machine, case, scope, torch.cuda.get_device_properties(0).total_memory, largest)


def search(fits: Callable[[int], bool], first: int = STEP) -> int:
    """The largest multiple of `STEP` that fits, 0 if none does: doubled until it does not, then bisected.

    Args:
        fits: whether a batch does; if one does not, no larger one does.
        first: where to begin.
    """
    below, above = 0, max(1, first // STEP)  # in multiples of STEP
    while fits(above * STEP):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle * STEP) else (below, middle)
    return below * STEP


def _largest_of(case: Case, scope: str, variant: Variant, advance: Advance) -> LargestBatch:
    workload = Workload(dataclasses.replace(case, batch=2), scope, variant)
    limits = ["memory"]

    def fits(batch: int) -> bool:
        advance(f"{variant}, batch {batch}")
        try:
            workload.run(workload.inputs(dataclasses.replace(case, batch=batch)))
        except (RuntimeError, EngineError) as error:
            limits.append("memory" if is_out_of_memory(error) else first_line(error))
            return False
        finally:
            workload.clear()
            release_memory()
        return True

    batch = search(fits, case.batch)
    return LargestBatch(variant.backend, variant.memory_format, batch, limits[-1])
