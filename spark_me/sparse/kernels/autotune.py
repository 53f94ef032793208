"""Where our Triton kernels compute. Importing this imports no Triton: their modules are imported where one is used."""

import importlib.util
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from spark_me.devices import float32_products

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
    """Of the rows; "tf32" for float32 where torch multiplies it so."""


Algorithms = Mapping[str, Callable[..., Tensor]]
"""By name: the algorithm, then how it cuts the work, as in "implicit_gemm 128x64". The last computes by torch's own
operations: what it gives in float32 is what the others have to."""
Timer = Callable[[Callable[[], object]], float]
"""Milliseconds of some work on the device."""
Times = dict[str, float]
"""Milliseconds of every algorithm, forward and backward; infinite where it cannot be used."""
Finder = Callable[[Operation, Sequence[str], Callable[[], Times]], Times]
"""From an operation, the names of its algorithms and a measurement of them: their times, measured or known before."""
TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 5e-2}
"""How far a row of any result may be from the reference, as a share of the rows' root mean square."""


class Choices:
    """What is known in this process, and what is pinned."""

    def __init__(self, timer: Timer) -> None:
        self.measured: dict[Operation, Times] = {}
        self.pinned: tuple[str, ...] | None = None
        """Names in order of preference; None: measure."""
        self.find: Finder = measure_here
        """Where the times of an operation come from that comes up for the first time."""
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

    @contextmanager
    def found_by(self, find: Finder) -> Iterator[None]:
        """Within, times come from `find`, and nothing is known from before."""
        before = self.measured, self.find
        self.measured, self.find = {}, find
        try:
            yield
        finally:
            self.measured, self.find = before

    def _fastest(self, name: str, geometry: tuple[int, ...], algorithms: Algorithms, inputs: tuple[Tensor, ...]) -> str:
        names = tuple(algorithms)
        if len(names) == 1:
            return names[0]
        operation = _operation(name, geometry, inputs)
        if operation not in self.measured:
            self.measured[operation] = self.find(operation, names, lambda: self._measure(algorithms, operation, inputs))
        times = self.measured[operation]
        fastest = min(times, key=times.__getitem__)
        return fastest if math.isfinite(times[fastest]) else names[-1]

    def _measure(self, algorithms: Algorithms, operation: Operation, inputs: tuple[Tensor, ...]) -> Times:
        """Times of the algorithms whose results are the reference's; the others are left out, in a line each."""
        times = dict.fromkeys(algorithms, math.inf)
        # Not the caller's hooks: activation checkpointing counts what a block saves. Nor its autocast.
        with (
            torch.cuda.device_of(inputs[0]),
            torch.autocast(inputs[0].device.type, enabled=False),
            saved_tensors_hooks(lambda x: x, lambda x: x),
        ):
            *_, reference = algorithms
            trial = Trial(inputs, operation.gradients)
            with _left_out(reference):
                expected = trial.in_float32(algorithms[reference])
                for name, compute in algorithms.items():
                    with _left_out(name):
                        trial.require_agreement(trial.results(compute), expected, TOLERANCE[operation.dtype])
                        times[name] = self._timer(partial(trial.results, compute))
        return times


def measure_here(operation: Operation, names: Sequence[str], measure: Callable[[], Times]) -> Times:
    """The `Finder` that knows nothing from before."""
    return measure()


class WrongResult(Exception):
    """An algorithm does not compute what the reference does."""


class Trial:
    """Inputs like those at hand, but drawn: at hand, a weight may be zero, which hides what is wrong.

    Detached from them, so that measuring leaves no gradient in the parameters and nothing in the graph; and drawn by a
    generator of their own.
    """

    def __init__(self, inputs: Sequence[Tensor], gradients: Sequence[bool]) -> None:
        self.inputs = [
            self._drawn(x, place).requires_grad_(needed) for place, (x, needed) in enumerate(zip(inputs, gradients))
        ]
        self.upstream: Tensor | None = None

    @staticmethod
    def _drawn(x: Tensor, seed: int) -> Tensor:
        """Such that sums over the inputs of a place are of order 1."""
        generator = torch.Generator(x.device).manual_seed(seed)
        values = torch.randn(x.shape, generator=generator, device=x.device)
        fan_in = x[0].numel() if x.dim() > 2 else 1
        return values.div_(fan_in**0.5).to(x.dtype)

    def in_float32(self, compute: Callable[..., Tensor]) -> list[Tensor]:
        """The results of an algorithm in float32, by products of float32's own; draws what flows back."""
        inputs = [x.detach().float().requires_grad_(x.requires_grad) for x in self.inputs]
        with float32_products(tf32=False):
            out = compute(*inputs)
            self.upstream = self._drawn(out.detach().to(self.inputs[0].dtype), len(inputs))
            return _with_gradients(out, inputs, self.upstream.float())

    def results(self, compute: Callable[..., Tensor]) -> list[Tensor]:
        """An algorithm's output, then the gradients of those inputs that need one."""
        assert self.upstream is not None
        return _with_gradients(compute(*self.inputs), self.inputs, self.upstream)

    @staticmethod
    def require_agreement(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
        """Refuse an algorithm that is wrong anywhere.

        Raises:
            WrongResult: saying where and by how much.
        """
        for place, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
            rows = reference.reshape(len(reference), -1)
            differences = (ours.float().reshape(rows.shape) - rows).norm(dim=1)
            error = (differences.max() / rows.norm() * len(rows) ** 0.5).item()
            if not error <= tolerance:  # NaN is not
                what = f"gradient {place}" if place else "output"
                raise WrongResult(f"its {what} is off by {error:.2g} of the reference's where it is worst")


def _with_gradients(out: Tensor, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    wanted = [x for x in inputs if x.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, wanted, upstream) if wanted else ())]


@contextmanager
def _left_out(name: str) -> Iterator[None]:
    """An algorithm that fails is no choice, and a line says so; want of memory is nothing to be told of."""
    try:
        yield
    except WrongResult as error:
        _log.warning("%s computes wrongly on this GPU and is left out: %s", name, error)
    except torch.cuda.OutOfMemoryError:
        pass  # no choice for this batch; if none is, the one that runs says so
    except Exception as error:  # compilers and libraries raise whatever they trip over
        reason = str(error).strip().partition("\n")[0]
        _log.warning("%s does not run on this GPU and is left out: %s: %s", name, type(error).__name__, reason)


def time_on_gpu(work: Callable[[], object]) -> float:
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
    """What this process knows: milliseconds of every algorithm; the smallest is used."""
    return {operation: dict(times) for operation, times in CHOICES.measured.items()}


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
