"""One case: memory of each backend, then time of all of them interleaved."""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from spark_me import sparse
from spark_me.bench.case import SCOPES, Case
from spark_me.bench.results import Report, ScopeResult, compare
from spark_me.bench.workloads import BACKENDS, Variant, Workload, variants_of
from spark_me.encoder import sparsify
from spark_me.errors import EngineError, UserError, first_line
from spark_me.machine import describe_machine
from spark_me.networks import dense_network

Key = TypeVar("Key")
Clock = Callable[[], float]
Advance = Callable[[str], None]
"""Told what comes next, for a progress bar."""


class Timed(Protocol):
    """What can be timed."""

    def run(self) -> None:
        """The work; finished when it returns."""

    def clear(self) -> None:
        """What is done between two runs and not timed."""


def time_interleaved(
    workloads: Mapping[Key, Timed],
    *,
    runs: int,
    warmup: int,
    advance: Advance = lambda label: None,
    clock: Clock = time.perf_counter,
) -> dict[Key, list[float]]:
    """Run every workload once a round.

    Args:
        workloads: what to run, in this order in every round.
        runs: rounds that count.
        warmup: rounds before them that do not.
        advance: told the name of each workload before it runs.
        clock: seconds.

    Returns:
        `runs` times in seconds for each workload.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in workloads}
    for turn in range(warmup + runs):
        for key, workload in workloads.items():
            advance(f"{'warm-up' if turn < warmup else 'timing'} {key}")
            workload.clear()
            gc.collect()  # or the collector would run in the middle of someone's pass
            start = clock()
            workload.run()
            elapsed = clock() - start
            if turn >= warmup:
                seconds[key].append(elapsed)
        workload.clear()
    return seconds


def time_median(work: Callable[[], None], *, runs: int, warmup: int, clock: Clock = time.perf_counter) -> float:
    """Median seconds of one piece of work."""
    seconds = []
    for turn in range(warmup + runs):
        start = clock()
        work()
        elapsed = clock() - start
        if turn >= warmup:
            seconds.append(elapsed)
    return statistics.median(seconds)


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


def kind_and_line(error: Exception) -> str:
    """An error's kind and the first line of its text."""
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "does not fit into the GPU's memory"
    return f"does not compile ({kind_and_line(error)})"


Call = tuple[str, tuple[Any, ...]]
"""A method of `Neighbours` and its arguments."""


def time_tables(case: Case, *, runs: int, warmup: int) -> float:
    """Median seconds to build the `native` backend's pyramid and neighbour tables for one batch."""
    _, visible = case.draw()
    calls = calls_of_a_pass(case)

    def build() -> None:
        pyramid = sparse.Pyramid(visible, case.patch_size, "native", case.device)
        pyramid.raster_index(1)  # gathers the visible pixels
        for method, arguments in calls:
            getattr(pyramid.neighbours, method)(*arguments)
        if case.device == "cuda":
            torch.cuda.synchronize()

    return time_median(build, runs=runs, warmup=warmup)


def calls_of_a_pass(case: Case) -> list[Call]:
    """What the encoder's forward and backward pass asks the tables for, each question once."""
    images, visible = case.draw()
    pyramid = sparse.Pyramid(visible, case.patch_size, "native", case.device)
    recorder: Any = _Recorder(pyramid.neighbours)
    pyramid.neighbours = recorder
    encoder = sparsify(dense_network(case.encoder)).to(case.device)
    with case.computing():
        with case.autocast():
            features = encoder(sparse.to_sparse(images, pyramid))
        torch.stack([x.F.mean(dtype=torch.float32) for x in features]).sum().backward()
    return list(recorder.calls)


class _Recorder:
    """Passes everything on to a pyramid's tables and remembers which methods were called with what."""

    def __init__(self, neighbours: Any) -> None:
        self._neighbours = neighbours
        self.calls: dict[Call, None] = {}

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._neighbours, name)
        return self._recording(name, attribute) if callable(attribute) else attribute

    def _recording(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls[name, arguments] = None
            return method(*arguments)

        return call


def measure(
    case: Case,
    scopes: Sequence[str] = SCOPES,
    backends: Sequence[str] = BACKENDS,
    *,
    runs: int = 5,
    warmup: int = 2,
    memory: bool = True,
    compiled: bool = True,
    advance: Advance = lambda label: None,
) -> Report:
    """Measure forward and backward passes of several backends.

    A pass goes from images (and, for sparse backends, the mask: pyramid and tables are built in every pass) to the
    gradients of all parameters. On the CPU memory is measured in spawned processes, so a script that calls this needs
    the usual `if __name__ == "__main__":`.

    Args:
        case: what is computed.
        scopes: "encoder", "step" or both.
        backends: of `BACKENDS`; a dense one runs in both memory formats, on a GPU also compiled.
        runs: passes that count, of each backend.
        warmup: passes before them.
        memory: measure the peak memory of activations too.
        compiled: on a GPU, run the dense backends compiled too; on a CPU that is slower, and they never are.
        advance: told what comes next, `count_units` times in all.

    Raises:
        UserError: for a case that does not fit, and when memory does not suffice.
    """
    if runs < 1 or warmup < 0:
        raise UserError(f"--runs {runs} --warmup {warmup}: at least one run and no negative warm-up")
    variants = _variants(case, backends, compiled)
    case.check(scopes)
    try:
        results = [_measure_scope(case, scope, variants, runs, warmup, memory, advance) for scope in scopes]
    except RuntimeError as error:
        if is_out_of_memory(error) or "can't allocate memory" in str(error):
            raise UserError(f"the memory of {case.device} does not suffice: lower --batch {case.batch}") from None
        raise
    with case.computing():
        machine = describe_machine(case.device)
    return Report(machine, case, case.visible_patches, case.patches, runs, warmup, results)


def count_units(
    case: Case,
    scopes: Sequence[str],
    backends: Sequence[str],
    runs: int,
    warmup: int,
    memory: bool,
    compiled: bool = True,
) -> int:
    """How often `measure` calls `advance`, if everything runs."""
    first = memory or case.device == "cuda"
    passes = len(scopes) * len(_variants(case, backends, compiled)) * (warmup + runs + first)
    return passes + _with_tables(scopes, backends)


def _variants(case: Case, backends: Sequence[str], compiled: bool) -> list[Variant]:
    return variants_of(backends, compiled=compiled and case.device == "cuda")


def _measure_scope(
    case: Case, scope: str, variants: list[Variant], runs: int, warmup: int, memory: bool, advance: Advance
) -> ScopeResult:
    # First what does not fit should show: before hours of timing, not after.
    left_out: dict[str, str] = {}
    if case.device == "cuda":
        workloads, peaks, left_out = try_all(case, scope, variants, advance)
        if not workloads:
            raise UserError(f"no backend runs {case.encoder} at --batch {case.batch}: {'; '.join(left_out.values())}")
    else:
        peaks = {}
        for variant in variants if memory else []:
            advance(f"memory {variant}")
            peaks[variant] = activation_bytes(case, scope, variant)
        workloads = {variant: Workload(case, scope, variant) for variant in variants}
    seconds = time_interleaved(workloads, runs=runs, warmup=warmup, advance=advance)
    table_seconds = None
    if _with_tables([scope], [variant.backend for variant in workloads]):
        advance("tables")
        table_seconds = time_tables(case, runs=runs, warmup=warmup)
    return compare(
        scope,
        seconds,
        peaks if memory else {},
        batch=case.batch,
        visible_share=case.visible_share,
        table_seconds=table_seconds,
        left_out=left_out,
    )


def _with_tables(scopes: Sequence[str], backends: Sequence[str]) -> bool:
    return "encoder" in scopes and "native" in backends
