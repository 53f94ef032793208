"""One case: memory of each backend, then time of all of them interleaved, and how they compare."""

import ctypes
import dataclasses
import gc
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.benchmark import timer

from spark_me import sparse
from spark_me.bench.workloads import Case, Variant, Workload, sum_of_means
from spark_me.encoder import sparsify
from spark_me.errors import EngineError, UserError, first_line
from spark_me.machine import describe_machine
from spark_me.networks import dense_network

Record = dict[str, Any]
"""Figures, as `--json` writes them."""
Advance = Callable[[str], None]
"""Told what comes next, for a progress bar."""


class Timed(Protocol):
    """What can be timed: `run` is; `clear`, after it, is not."""

    def run(self) -> None: ...

    def clear(self) -> None: ...


def time_interleaved(
    workloads: Mapping[Any, Timed],
    *,
    runs: int,
    warmup: int,
    advance: Advance,
    clock: Callable[[], float] = timer,  # torch's: it waits for the GPU
) -> dict[Any, list[float]]:
    """Run every workload once a round; the seconds of all rounds but the first `warmup`."""
    seconds: dict[Any, list[float]] = {key: [] for key in workloads}
    for turn in range(warmup + runs):
        for key, workload in workloads.items():
            advance(f"{'warm-up' if turn < warmup else 'timing'} {key}")
            gc.collect()  # or the collector would run in the middle of someone's pass
            start = clock()
            workload.run()
            seconds[key].append(clock() - start)
            workload.clear()
    return {key: times[warmup:] for key, times in seconds.items()}


CLEAR_REFS = Path("/proc/self/clear_refs")


def activation_bytes(case: Case, scope: str, variant: Variant) -> int | None:
    """Peak bytes of one pass on the CPU; None where the platform does not tell.

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
    side = 2 * case.patch_size
    # Libraries take their buffers, and gradients come to be.
    workload.run(workload.inputs(dataclasses.replace(case, batch=2, image_size=(side, side), mask_ratio=0.5)))
    workload.model.zero_grad(set_to_none=False)
    return peak_in_memory(workload)


def peak_in_memory(workload: Timed) -> int | None:
    """By Linux's own count of resident memory, whose high-water mark can be reset."""
    # What the C library keeps of earlier work would serve the pass without showing in its peak; others keep little.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    workload.run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_on_gpu(workload: Timed) -> int:
    """By torch's own count of what is allocated on the GPU; the workload has run, and its gradients exist."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    workload.run()
    return torch.cuda.max_memory_allocated() - before


Trials = tuple[dict[Variant, Workload], dict[Variant, int | None], dict[str, str]]
"""What can be timed, its peak bytes of activations, and in a line why another one is left out, by its name."""


def try_all(case: Case, scope: str, variants: Sequence[Variant], advance: Advance) -> Trials:
    """Run every variant on the GPU. One that does not fit or does not compile is left out, the others go on."""
    trials: Trials = {}, {}, {}
    workloads, peaks, left_out = trials
    for variant in variants:
        advance(f"first passes {variant}")
        try:
            workloads[variant], peaks[variant] = _first_passes(case, scope, variant)
        except Exception as error:  # a compiler raises whatever it trips over
            if isinstance(error, EngineError):  # it is built for the CPU: our own backend does without it
                reason = str(error)
            elif is_out_of_memory(error):
                reason = "does not fit into the GPU's memory"
            elif variant.compiled:
                reason = f"does not compile ({kind_and_line(error)})"
            else:
                raise
            left_out[str(variant)] = reason
        # Only now has the error let go of the tensors of its pass.
        release_memory()
    return trials


def _first_passes(case: Case, scope: str, variant: Variant) -> tuple[Workload, int]:
    workload = Workload(case, scope, variant)
    for _ in range(2):
        workload.run()
    peak = peak_on_gpu(workload)
    workload.clear()
    return workload, peak


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
    return f"{type(error).__name__}: {first_line(error)}"


class Tables:
    """The `native` backend's pyramid and neighbour tables of one batch, built as every pass builds them.

    Attributes:
        calls: methods of `Neighbours` with the arguments that the encoder's pass asks them, each once.
    """

    def __init__(self, case: Case) -> None:
        images, visible = case.draw()
        self.new_pyramid = lambda: sparse.Pyramid(visible, case.patch_size, "native", case.device)
        pyramid, encoder = self.new_pyramid(), sparsify(dense_network(case.encoder)).to(case.device)
        recorder: Any = _Recorder(pyramid.neighbours)
        pyramid.neighbours = recorder
        with case.computing():
            with case.autocast():
                loss = sum_of_means([x.F for x in encoder(sparse.to_sparse(images, pyramid))])
            loss.backward()
        self.calls = list(recorder.calls)

    def run(self) -> None:
        """Build them."""
        pyramid = self.new_pyramid()
        pyramid.raster_index(1)  # gathers the visible pixels
        for method, arguments in self.calls:
            getattr(pyramid.neighbours, method)(*arguments)

    def clear(self) -> None:
        """Nothing stays of a run."""


class _Recorder:
    """Passes everything on to a pyramid's tables and remembers which methods were called with what."""

    def __init__(self, neighbours: Any) -> None:
        self._neighbours = neighbours
        self.calls: dict[tuple[str, tuple[Any, ...]], None] = {}

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._neighbours, name)

        def call(*arguments: Any) -> Any:
            self.calls[name, arguments] = None
            return attribute(*arguments)

        return call if callable(attribute) else attribute


def measure(
    case: Case,
    scopes: Sequence[str],
    variants: Sequence[Variant],
    *,
    runs: int,
    warmup: int,
    memory: bool,
    advance: Advance,
) -> Record:
    """Measure passes of several backends.

    A pass goes from images (and, for sparse backends, the mask: pyramid and tables are built in every pass) to the
    gradients of all parameters. On the CPU memory is measured in spawned processes, so a script that calls this needs
    the usual `if __name__ == "__main__":`.

    Args:
        case, scopes, variants: what is measured; checked.
        runs, warmup: passes of each variant that count, and passes before them that do not.
        memory: whether to measure the peak memory of activations, too.
        advance: called `count_units` times.

    Raises:
        UserError: when memory does not suffice.
    """
    check_rounds(runs, warmup)
    results = []
    try:
        for scope in scopes:
            # First what does not fit should show: before hours of timing, not after.
            workloads, peaks, left_out = _ready(case, scope, variants, memory, advance)
            timed: dict[Any, Timed] = {**workloads} | (
                {"tables": Tables(case)} if _with_tables(scope, workloads) else {}
            )
            seconds = time_interleaved(timed, runs=runs, warmup=warmup, advance=advance)
            tables = seconds.pop("tables", None)
            figures = compare(case, seconds, peaks if memory else {}, tables)
            results.append({"scope": scope, **figures, "left_out": left_out})
    except RuntimeError as error:
        if is_out_of_memory(error) or "can't allocate memory" in str(error):
            raise UserError(f"the memory of {case.device} does not suffice: lower --batch {case.batch}") from None
        raise
    counts = {"visible_patches": case.visible_patches, "patches": case.patches, "runs": runs, "warmup": warmup}
    return {**case_on_machine(case), **counts, "scopes": results}


def check_rounds(runs: int, warmup: int) -> None:
    """Refuse too few.

    Raises:
        UserError: saying so.
    """
    if runs < 1 or warmup < 0:
        raise UserError(f"--runs {runs} --warmup {warmup}: at least one run and no negative warm-up")


def _ready(case: Case, scope: str, variants: Sequence[Variant], memory: bool, advance: Advance) -> Trials:
    if case.device == "cuda":
        trials = try_all(case, scope, variants, advance)
        if not trials[0]:
            raise UserError(f"no backend runs {case.encoder} at --batch {case.batch}: {'; '.join(trials[2].values())}")
        return trials
    peaks = {}
    for variant in variants if memory else []:
        advance(f"memory {variant}")
        peaks[variant] = activation_bytes(case, scope, variant)
    return {variant: Workload(case, scope, variant) for variant in variants}, peaks, {}


def count_units(
    case: Case, scopes: Sequence[str], variants: Sequence[Variant], runs: int, warmup: int, memory: bool
) -> int:
    """How often `measure` calls `advance`, if everything runs."""
    first = memory or case.device == "cuda"
    tables = sum(_with_tables(scope, variants) for scope in scopes)
    return len(scopes) * len(variants) * (first + warmup + runs) + tables * (warmup + runs)


def _with_tables(scope: str, variants: Iterable[Variant]) -> bool:
    return scope == "encoder" and Variant("native") in variants


def case_on_machine(case: Case) -> Record:
    """What every record begins with: a figure says nothing without it."""
    with case.computing():
        machine = describe_machine(case.device)
    return {"machine": dataclasses.asdict(machine), "case": dataclasses.asdict(case)}


def compare(
    case: Case,
    seconds: Mapping[Variant, list[float]],
    peaks: Mapping[Variant, int | None],
    tables: Sequence[float] | None = None,
) -> Record:
    """Medians and ratios from the seconds of all runs, of the tables too, and peak bytes of activations.

    A figure is None that needs a backend which did not run, or memory that was not measured.
    """
    medians: dict[Variant | None, float] = {variant: statistics.median(times) for variant, times in seconds.items()}
    # The baseline, which the others are compared with, is the fastest mode of a dense backend.
    masked, dense = (
        min((variant for variant in seconds if variant.backend == backend), key=medians.__getitem__, default=None)
        for backend in ("masked_dense", "dense")
    )
    # All of the sparsity paid out.
    floor = None if dense is None else medians[dense] * case.visible_patches / case.patches
    masked_peak = None if masked is None else peaks.get(masked)
    rows = [
        {
            **variant._asdict(),
            "baseline": variant in (masked, dense),
            "seconds": times,
            "median": medians[variant],
            "fastest": min(times),
            "slowest": max(times),
            "images_per_second": case.batch / medians[variant],
            "speed_to_masked_dense": _ratio(medians.get(masked), medians[variant]),
            "speed_to_dense": _ratio(medians.get(dense), medians[variant]),
            "ratio_to_floor": _ratio(medians[variant], floor),
            "activation_bytes": peaks.get(variant),
            "activation_ratio": _ratio(peaks.get(variant), masked_peak),
        }
        for variant, times in seconds.items()
    ]
    of_tables = None
    if tables:
        median = statistics.median(tables)
        of_tables = {"seconds": median, "share": median / medians[Variant("native")]}
    return {"rows": rows, "floor_seconds": floor, "tables": of_tables}


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def fastest_rows(result: Record) -> dict[str, Record]:
    """The row of each backend of a scope, in its fastest mode."""
    fastest: dict[str, Record] = {}
    for row in result["rows"]:
        best = fastest.setdefault(row["backend"], row)
        if row["median"] < best["median"]:
            fastest[row["backend"]] = row
    return fastest
