"""One case: memory of each backend, then time of all of them interleaved."""

from collections.abc import Sequence

import torch

from spark_me.benchmark.case import SCOPES, Case
from spark_me.benchmark.memory import activation_bytes
from spark_me.benchmark.results import Report, ScopeResult, compare
from spark_me.benchmark.tables import time_tables
from spark_me.benchmark.timing import Advance, time_interleaved
from spark_me.benchmark.twins import check_twin
from spark_me.benchmark.workloads import BACKENDS, Variant, Workload, variants_of
from spark_me.errors import UserError
from spark_me.machine import describe_machine


def measure(
    case: Case,
    scopes: Sequence[str] = SCOPES,
    backends: Sequence[str] = BACKENDS,
    *,
    runs: int = 5,
    warmup: int = 2,
    memory: bool = True,
    advance: Advance = lambda label: None,
) -> Report:
    """Measure forward and backward passes of several backends.

    A pass goes from images (and, for sparse backends, the mask: pyramid and tables are built in every pass) to the
    gradients of all parameters. Memory is measured in spawned processes, so a script that calls this needs the usual
    `if __name__ == "__main__":`.

    Args:
        case: what is computed.
        scopes: "encoder", "step" or both.
        backends: of `BACKENDS`; a dense one runs in both memory formats.
        runs: passes that count, of each backend.
        warmup: passes before them.
        memory: measure the peak memory of activations too.
        advance: told what comes next, `count_units` times in all.

    Raises:
        UserError: for a case that does not fit, and when memory does not suffice.
    """
    if runs < 1 or warmup < 0:
        raise UserError(f"--runs {runs} --warmup {warmup}: at least one run and no negative warm-up")
    variants = variants_of(backends)
    case.check(scopes)
    if {"masked_dense", "dense"} & set(backends):
        check_twin(case.encoder)
    try:
        results = [_measure_scope(case, scope, variants, runs, warmup, memory, advance) for scope in scopes]
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"the memory of {case.device} does not suffice: lower --batch {case.batch}") from None
        raise
    machine = describe_machine(case.device)
    return Report(machine, case, case.visible_patches, case.patches, runs, warmup, results)


def count_units(scopes: Sequence[str], backends: Sequence[str], runs: int, warmup: int, memory: bool) -> int:
    """How often `measure` calls `advance`."""
    return len(scopes) * len(variants_of(backends)) * (warmup + runs + memory) + _with_tables(scopes, backends)


def _measure_scope(
    case: Case, scope: str, variants: list[Variant], runs: int, warmup: int, memory: bool, advance: Advance
) -> ScopeResult:
    # Memory first: what does not fit should fail before hours of timing, not after.
    peaks: dict[Variant, int | None] = {}
    if memory:
        for variant in variants:
            advance(f"memory {variant}")
            peaks[variant] = activation_bytes(case, scope, variant)
    # Shapes never change here, so cuDNN may search for its best kernels: the yardstick has to be a good one.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
        workloads = {variant: Workload(case, scope, variant) for variant in variants}
        seconds = time_interleaved(workloads, runs=runs, warmup=warmup, advance=advance)
    table_seconds = None
    if _with_tables([scope], [variant.backend for variant in variants]):
        advance("tables")
        table_seconds = time_tables(case, runs=runs, warmup=warmup)
    return compare(
        scope, seconds, peaks, batch=case.batch, visible_share=case.visible_share, table_seconds=table_seconds
    )


def _with_tables(scopes: Sequence[str], backends: Sequence[str]) -> bool:
    return "encoder" in scopes and "fused" in backends
