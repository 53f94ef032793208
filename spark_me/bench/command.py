"""`spark-me bench`: refuse what does not fit, measure, print, write."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spark_me.bench.case import SCOPES, Case
from spark_me.bench.report import format_largest, format_report, format_sweep
from spark_me.bench.sweep import SWEEPS, cases_of, draw_sweep, find_largest_batches, sweep
from spark_me.bench.timing import count_units, measure
from spark_me.errors import UserError
from spark_me.files import atomic_write, check_output, write_json


def bench(case: Case, scope: str, json_file: Path | None, **options: Any) -> None:
    """Measure one case and print it.

    Args:
        case: what is measured.
        scope: one of `SCOPES`, or "both".
        json_file: where all figures go.
        options: `backends`, `runs`, `warmup`, `memory`, `compiled` of `measure`.

    Raises:
        UserError: for input that does not fit, before anything is measured.
    """
    scopes = _scopes(scope)
    case.check(scopes)
    check_output(json_file)
    with _Progress(count_units(case, scopes, **options)) as progress:
        report = measure(case, scopes, advance=progress.advance, **options)
    print(format_report(report))
    if json_file is not None:
        write_json(json_file, dataclasses.asdict(report))


def bench_sweep(
    case: Case,
    scope: str,
    json_file: Path | None,
    name: str,
    values: Sequence[float] | None,
    plot_file: Path | None,
    **options: Any,
) -> None:
    """Measure a case at several values of one property, print the table, draw the plot.

    Args:
        case: everything that stays the same.
        scope: one of `SCOPES`, or "both".
        json_file: where all figures go, anew after each value: a sweep that breaks off leaves its beginning.
        name: a key of `SWEEPS`.
        values: None takes those of `SWEEPS`.
        plot_file: the PNG to draw.
        options: `backends`, `runs`, `warmup`, `memory`, `compiled` of `measure`.

    Raises:
        UserError: for input that does not fit, before anything is measured.
    """
    scopes = _scopes(scope)
    values = SWEEPS[name] if values is None else values
    cases_of(case, name, values, scopes)
    if plot_file is not None and plot_file.suffix != ".png":
        raise UserError(f"--plot {plot_file}: the picture is a PNG, so end the name in .png")
    check_output(json_file)
    check_output(plot_file)
    with _Progress(len(values) * count_units(case, scopes, **options)) as progress:
        for result in sweep(case, name, values, scopes, advance=progress.advance, **options):
            if json_file is not None:
                write_json(json_file, result.as_dict())
    print(format_sweep(result))
    if plot_file is not None:
        with atomic_write(plot_file) as file:
            file.write(draw_sweep(result))


def bench_largest(case: Case, scope: str, json_file: Path | None, backends: Sequence[str]) -> None:
    """Find the largest batch of each backend that fits into the GPU, and print it.

    Args:
        case: everything else.
        scope: one of `SCOPES`.
        json_file: where all figures go.
        backends: of `BACKENDS`.

    Raises:
        UserError: for input that does not fit, before anything is measured.
    """
    check_output(json_file)
    with _Progress(None) as progress:
        result = find_largest_batches(case, scope, backends, progress.advance)
    print(format_largest(result))
    if json_file is not None:
        write_json(json_file, dataclasses.asdict(result))


class _Progress:
    """A bar on stderr that names what is running; a log file gets none."""

    def __init__(self, units: int | None) -> None:
        self._bar = tqdm(total=units, file=sys.stderr, leave=False, disable=not sys.stderr.isatty())
        self._begun = False

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, label: str) -> None:
        """One unit is over, if any had begun; the next one is called `label`."""
        self._bar.set_description_str(label, refresh=False)
        self._bar.update(int(self._begun))
        self._begun = True


def _scopes(scope: str) -> tuple[str, ...]:
    return SCOPES if scope == "both" else (scope,)
