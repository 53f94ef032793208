"""Peak memory of activations: what one pass needs above weights, gradients and inputs, in a fresh process."""

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from spark_me.benchmark.case import Case
from spark_me.benchmark.timing import Timed
from spark_me.benchmark.workloads import Variant, Workload
from spark_me.errors import UserError

_STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def activation_bytes(case: Case, scope: str, variant: Variant) -> int | None:
    """Peak bytes of one forward and backward pass on the CPU; None where the platform does not tell.

    The process is a new one: in an old one the allocator would answer from memory that it kept.

    Raises:
        UserError: if the process is killed, which is how the kernel answers a lack of memory.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        try:
            return pool.submit(_measure_here, case, scope, variant).result()
        except BrokenProcessPool:
            raise UserError(
                f"{variant}: the process that measured its memory was killed, most likely for lack of memory: "
                f"lower --batch {case.batch}, leave the backend out of --backends, or use --no-memory"
            ) from None


def _measure_here(case: Case, scope: str, variant: Variant) -> int | None:
    workload = Workload(case, scope, variant)
    gradients = [torch.zeros_like(parameter) for parameter in workload.model.parameters()]
    for parameter, gradient in zip(workload.model.parameters(), gradients):
        parameter.grad = gradient
    workload.run(workload.inputs(case.smallest()))  # libraries take their buffers
    for gradient in gradients:
        gradient.zero_()
    return peak_in_memory(workload)


def peak_on_gpu(workload: Timed) -> int:
    """By torch's own count of what is allocated on the GPU; the workload has run, and its gradients exist."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    workload.run()
    return torch.cuda.max_memory_allocated() - before


def peak_in_memory(workload: Timed) -> int | None:
    """By Linux's own count of resident memory, whose high-water mark can be reset."""
    _return_free_memory()
    try:
        CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
    except OSError:
        return None
    workload.run()
    return _resident("VmHWM") - before


def _return_free_memory() -> None:
    """What the C library keeps of earlier work would serve the pass without showing in its peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc; others keep little
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, which counts in KiB."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
