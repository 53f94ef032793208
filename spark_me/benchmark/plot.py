"""A sweep as a picture."""

from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spark_me.benchmark.sweep import Sweep
from spark_me.benchmark.workloads import BACKENDS

_AXIS = {"mask_ratio": "visible share of the patches", "batch": "images in a batch", "image_size": "image side, pixels"}


def draw_sweep(sweep: Sweep) -> bytes:
    """A PNG with one panel a scope and one curve a backend: seconds of a pass over what was swept."""
    scopes = [result.scope for result in sweep.reports[0].scopes]
    figure = Figure(figsize=(6.4 * len(scopes), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, scope in zip(figure.subplots(1, len(scopes), squeeze=False)[0], scopes):
        _draw_scope(axes, sweep, scope)
    case = sweep.reports[0].case
    figure.suptitle(f"{case.encoder}, {case.dtype}, {sweep.reports[0].machine.gpu or 'CPU'}")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _draw_scope(axes: Axes, sweep: Sweep, scope: str) -> None:
    x = sweep.shares() if sweep.name == "mask_ratio" else sweep.values
    for backend in BACKENDS:
        if seconds := sweep.medians(scope, backend):
            axes.plot(x, seconds, marker="o", label=backend)
    if line := sweep.line(scope):
        ends = [min(x), max(x)]
        label = f"straight line through native (±{line.deviation:.0%})"
        axes.plot(ends, [line.intercept + line.slope * end for end in ends], "k--", linewidth=1, label=label)
    axes.set(title=f"{scope}, forward + backward", xlabel=_AXIS[sweep.name], ylabel="seconds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
