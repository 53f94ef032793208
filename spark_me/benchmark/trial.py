"""The first passes on a GPU: kernels are compiled and chosen, memory is measured, and it shows what cannot run."""

import gc
from collections.abc import Sequence
from typing import NamedTuple

import torch

from spark_me.benchmark.case import Case
from spark_me.benchmark.memory import peak_on_gpu
from spark_me.benchmark.timing import Advance
from spark_me.benchmark.workloads import Variant, Workload
from spark_me.errors import EngineError


class Trials(NamedTuple):
    """What can be timed, and what cannot."""

    workloads: dict[Variant, Workload]
    peaks: dict[Variant, int | None]
    """Bytes of activations; torch counts what is allocated, so no process of its own is needed."""
    left_out: dict[str, str]
    """A variant's name and, in a line, why it does not run."""


def try_all(case: Case, scope: str, variants: Sequence[Variant], advance: Advance) -> Trials:
    """Run every variant; one that does not fit or does not compile is left out, the others go on."""
    trials = Trials({}, {}, {})
    for variant in variants:
        advance(f"first passes {variant}")
        try:
            workload = Workload(case, scope, variant)
            for _ in range(2):
                workload.run()
            trials.peaks[variant] = peak_on_gpu(workload)
            workload.clear()
            trials.workloads[variant] = workload
        except EngineError as error:  # it is built for the CPU: our own backend does without it
            trials.left_out[str(variant)] = str(error)
        except Exception as error:  # a compiler raises whatever it trips over
            if not (is_out_of_memory(error) or variant.compiled):
                raise
            trials.left_out[str(variant)] = _reason(error)
        # Only now has the error let go of the tensors of its pass.
        release_memory()
    return trials


def release_memory() -> None:
    """Give memory that torch keeps for later back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory did not suffice; libraries say it in their own words."""
    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


def first_line(error: Exception) -> str:
    """An error's kind and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "does not fit into the GPU's memory"
    return f"does not compile ({first_line(error)})"
