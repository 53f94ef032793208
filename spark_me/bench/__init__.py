"""`spark-me bench`: what a pass costs, sparse against dense, measured side by side in one run."""

from spark_me.bench.case import DTYPES, SCOPES, Case
from spark_me.bench.results import Report, Row, ScopeResult
from spark_me.bench.sweep import SWEEPS, Sweep, sweep
from spark_me.bench.timing import measure
from spark_me.bench.workloads import BACKENDS

__all__ = [
    "BACKENDS",
    "DTYPES",
    "SCOPES",
    "SWEEPS",
    "Case",
    "Report",
    "Row",
    "ScopeResult",
    "Sweep",
    "measure",
    "sweep",
]
