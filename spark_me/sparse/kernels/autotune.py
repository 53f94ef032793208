"""Where our Triton kernels compute. Importing this imports no Triton: their modules are imported where one is used."""

import importlib.util
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""float64 stays with torch's operations, which the proofs of exactness compare in."""


@cache
def triton_available() -> bool:
    """Whether Triton is installed. torch for CUDA brings it along on Linux."""
    return importlib.util.find_spec("triton") is not None


def computes_in_triton(rows: Tensor) -> bool:
    """Whether rows [N, C] are normalised by our kernels: on a GPU, in single or half precision."""
    return rows.is_cuda and rows.dtype in KERNEL_DTYPES and triton_available()


_log = logging.getLogger(__name__)

ROUNDS, RUNS = 3, 5
"""An algorithm's time is the median of so many rounds of so many runs."""


class Operation(NamedTuple):
    """What a measurement is valid for."""

    name: str
    """"convolution", "convolution to dense" or "depthwise convolution"."""
    geometry: tuple[int, ...]
    """Tensor stride, kernel size, stride and dilation."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the inputs; rows are counted up to the next power of two, so that a few more or less change nothing."""
    gradients: tuple[bool, ...]
    """Which inputs need one."""
    dtype: str
    """Of the inputs; "tf32" for float32 where torch multiplies it so."""


Algorithms = Mapping[str, Callable[..., Tensor]]
"""By name: the algorithm, then how it cuts the work, as in "implicit_gemm 128x64"."""
Timer = Callable[[Callable[[], None]], float]
"""Milliseconds of some work on the device."""


class Choices:
    """What was measured in this process, and what is pinned."""

    def __init__(self, timer: Timer) -> None:
        self.measured: dict[Operation, dict[str, float]] = {}
        """Milliseconds of every algorithm, forward and backward."""
        self.pinned: tuple[str, ...] | None = None
        """Names in order of preference; None: measure."""
        self._timer = timer

    def run(self, name: str, geometry: tuple[int, ...], algorithms: Algorithms, *inputs: Tensor) -> Tensor:
        """Compute an operation: as pinned, else in the algorithm that was fastest for such inputs.

        Args:
            name: of the operation.
            geometry: all that it depends on beside its inputs.
            algorithms: from `inputs` to the same result.
            inputs: rows first.
        """
        if self.pinned is not None:
            chosen = _first_named(self.pinned, algorithms)
        else:
            chosen = self._fastest(name, geometry, algorithms, inputs)
        return algorithms[chosen](*inputs)

    def _fastest(self, name: str, geometry: tuple[int, ...], algorithms: Algorithms, inputs: tuple[Tensor, ...]) -> str:
        if len(algorithms) == 1:
            return next(iter(algorithms))
        operation = _operation(name, geometry, inputs)
        if operation not in self.measured:
            self.measured[operation] = {
                algorithm: self._milliseconds(algorithm, compute, inputs, operation.gradients)
                for algorithm, compute in algorithms.items()
            }
        milliseconds = self.measured[operation]
        return min(milliseconds, key=milliseconds.__getitem__)

    def _milliseconds(
        self, name: str, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradients: tuple[bool, ...]
    ) -> float:
        # Detached: measuring must leave no gradient in the parameters and nothing in the graph.
        inputs = tuple(x.detach().requires_grad_(needed) for x, needed in zip(inputs, gradients))
        wanted = [x for x in inputs if x.requires_grad]

        def work() -> None:
            out = compute(*inputs)
            if wanted:
                torch.autograd.grad(out, wanted, out.detach())

        try:
            # Not the caller's hooks: activation checkpointing counts what a block saves.
            with torch.cuda.device_of(inputs[0]), saved_tensors_hooks(lambda x: x, lambda x: x):
                return self._timer(work)
        except torch.cuda.OutOfMemoryError:
            return float("inf")  # no choice for this batch; if none is, the one that runs says so
        except Exception as error:  # compilers and libraries raise whatever they trip over
            reason = str(error).strip().partition("\n")[0]
            _log.warning("%s does not run on this GPU and is left out: %s: %s", name, type(error).__name__, reason)
            return float("inf")


def time_on_gpu(work: Callable[[], None]) -> float:
    """Milliseconds of some work on the current GPU, by its own clock."""
    work()  # compiles kernels
    rounds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(RUNS):
            work()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / RUNS)
    return statistics.median(rounds)


CHOICES = Choices(time_on_gpu)
"""This process's."""


@contextmanager
def choose(*algorithms: str) -> Iterator[None]:
    """Within, nothing is measured: an operation takes the first of these algorithms that it has, else its first.

    Algorithms are `implicit_gemm`, `tiles`, `pairs` and `dense` for convolutions, `gather`, `tiles` and `raster` for
    depthwise ones; with a size ("implicit_gemm 128x64") exactly that one. Runs with the same pins repeat bit by bit
    where cuDNN does (`torch.backends.cudnn.deterministic`).

    Args:
        algorithms: in order of preference.
    """
    before, CHOICES.pinned = CHOICES.pinned, algorithms
    try:
        yield
    finally:
        CHOICES.pinned = before


def measured_choices() -> dict[Operation, dict[str, float]]:
    """What this process has measured: milliseconds of every algorithm; the smallest is used."""
    return {operation: dict(milliseconds) for operation, milliseconds in CHOICES.measured.items()}


def is_open(rows: Tensor) -> bool:
    """Whether there is a choice for these rows: on a GPU, or where pinned; float64 is for proofs and always fixed."""
    return (rows.is_cuda or CHOICES.pinned is not None) and rows.dtype != torch.float64


def kernels_run_on(device: torch.device) -> bool:
    """Whether our Triton kernels run there: on GPUs, and on the CPU in Triton's interpreter."""
    if device.type != "cuda":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return _triton_is_there()


@cache
def _triton_is_there() -> bool:
    if not triton_available():
        _log.warning("Triton is not installed: sparse convolutions on the GPU take torch's own kernels, slower")
    return triton_available()


def _first_named(pins: tuple[str, ...], algorithms: Algorithms) -> str:
    named = (name for pin in pins for name in algorithms if pin in (name, name.split()[0]))
    return next(named, next(iter(algorithms)))


def _operation(name: str, geometry: tuple[int, ...], inputs: tuple[Tensor, ...]) -> Operation:
    rows, *parameters = inputs
    bucket = 1 << (len(rows) - 1).bit_length()
    tf32 = rows.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return Operation(
        name,
        geometry,
        ((bucket, rows.shape[1]), *(tuple(x.shape) for x in parameters)),
        tuple(torch.is_grad_enabled() and x.requires_grad for x in inputs),
        "tf32" if tf32 else str(rows.dtype).removeprefix("torch."),
    )
