"""`spark-me bench`: what a pass costs, sparse against dense, measured side by side in one run."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spark_me.bench.loading import DECODING, Loading, measure_loading
from spark_me.bench.report import format_record
from spark_me.bench.sweep import cases_of, draw_sweep, find_largest_batches, measure_each
from spark_me.bench.timing import Advance, Record, check_rounds, count_units, measure
from spark_me.bench.workloads import Case, variants_of
from spark_me.errors import UserError
from spark_me.files import atomic_write, check_output, write_json


def bench(
    case: Case,
    scope: str,
    json_file: Path | None = None,
    *,
    backends: Sequence[str],
    compiled: bool = True,
    largest_batch: bool = False,
    sweep: str | None = None,
    values: Sequence[float] | None = None,
    plot: Path | None = None,
    **options: Any,
) -> None:
    """Refuse what does not fit, before anything is measured; measure, print, write.

    Args:
        case, scope, backends: what is measured; both is encoder and step.
        json_file: where all figures go; of a sweep anew after each value: one that breaks off leaves its beginning.
        compiled: on a GPU, run the dense backends compiled too; on a CPU that is slower, and they never are.
        largest_batch: search for the largest batch that fits into the GPU, and time nothing.
        sweep, values, plot: go through values (None: the usual ones) of a key of `SWEEPS`, and draw it.
        options: `runs`, `warmup`, `memory` of `measure`.
    """
    scopes = ("encoder", "step") if scope == "both" else (scope,)
    variants = variants_of(backends, compiled=compiled and case.device == "cuda")
    cases = cases_of(case, sweep, values) if sweep else [case]
    for each in cases:
        each.check(scopes)
    if plot is not None and plot.suffix != ".png":
        raise UserError(f"--plot {plot}: the picture is a PNG, so end the name in .png")
    check_output(json_file)
    check_output(plot)
    with _progress(None if largest_batch else len(cases) * count_units(case, scopes, variants, **options)) as advance:
        records: Iterable[Record]
        if largest_batch:
            records = [find_largest_batches(case, scope, variants, advance)]
        elif sweep:
            records = measure_each(sweep, cases, scopes, variants, advance=advance, **options)
        else:
            records = [measure(case, scopes, variants, advance=advance, **options)]
        for record in records:
            if json_file is not None:
                write_json(json_file, record)
    print(format_record(record))
    if plot is not None:
        with atomic_write(plot) as picture:
            draw_sweep(record, picture)


def bench_loading(case: Loading, json_file: Path | None = None, *, runs: int, warmup: int) -> None:
    """The same of the loader: `runs` and `warmup` are rounds."""
    case.check()
    check_rounds(runs, warmup)
    check_output(json_file)
    with _progress(len({*case.workers}) * len(DECODING) * (warmup + runs)) as advance:
        record = measure_loading(case, runs=runs, warmup=warmup, advance=advance)
    if json_file is not None:
        write_json(json_file, record)
    print(format_record(record))


@contextmanager
def _progress(units: int | None) -> Iterator[Advance]:
    """A bar on stderr that names what is running; a log file gets none."""
    begun = False
    with tqdm(total=units, leave=False, disable=None) as bar:

        def advance(label: str) -> None:
            nonlocal begun
            bar.set_description_str(label, refresh=False)
            bar.update(int(begun))  # the unit before is over, if there was one
            begun = True

        yield advance
