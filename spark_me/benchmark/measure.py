"""One case: memory of each backend, then time of all of them interleaved."""

from collections.abc import Sequence

from spark_me.benchmark.case import SCOPES, Case
from spark_me.benchmark.memory import activation_bytes
from spark_me.benchmark.results import Report, ScopeResult, compare
from spark_me.benchmark.tables import time_tables
from spark_me.benchmark.timing import Advance, time_interleaved
from spark_me.benchmark.trial import is_out_of_memory, try_all
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
