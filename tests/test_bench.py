"""The benchmark's figures: timed by a fake clock, computed from invented times, and real ones of tiny cases."""

import dataclasses
import json

import pytest
import torch
from conftest import randomise, relative_error

from spark_me import sparse
from spark_me.bench import BACKENDS, SCOPES, Case, Report, Sweep, measure
from spark_me.bench.report import format_report, format_sweep
from spark_me.bench.results import compare
from spark_me.bench.sweep import SWEEPS, cases_of, draw_sweep, fit_line
from spark_me.bench.timing import calls_of_a_pass, count_units, time_interleaved
from spark_me.bench.workloads import DenseSparK, MaskedDenseSparK, Variant, Workload, headless, variants_of
from spark_me.errors import UserError
from spark_me.machine import describe_machine

TINY = Case("resnet18", batch=2, image_size=(64, 64), mask_ratio=0.5, decoder_width=32)
CONVNEXTS = ("convnext_tiny", "convnextv2_atto")
NATIVE, MINKOWSKI = Variant("native", None), Variant("minkowski", None)
MASKED = [Variant("masked_dense", "contiguous"), Variant("masked_dense", "channels_last")]
DENSE = [Variant("dense", "contiguous"), Variant("dense", "channels_last")]


pytestmark = pytest.mark.usefixtures("one_thread")


class FakeWorkload:
    """Takes the seconds it is told to, and as long again to clear."""

    def __init__(self, name: str, seconds: list[float], log: list[str], now: list[float]) -> None:
        self.name, self.seconds, self.log, self.now = name, iter(seconds), log, now

    def run(self) -> None:
        self.log.append(self.name)
        self.now[0] += next(self.seconds)

    def clear(self) -> None:
        self.now[0] += 100


def test_rounds_interleave_and_neither_warmup_nor_clearing_counts():
    log: list[str] = []
    now = [0.0]
    workloads = {name: FakeWorkload(name, seconds, log, now) for name, seconds in (("a", [9, 1, 2]), ("b", [8, 3, 4]))}
    announced: list[str] = []
    seconds = time_interleaved(workloads, runs=2, warmup=1, advance=announced.append, clock=lambda: now[0])
    assert seconds == {"a": [1, 2], "b": [3, 4]}
    assert log == ["a", "b"] * 3
    assert announced == ["warm-up a", "warm-up b", "timing a", "timing b", "timing a", "timing b"]


def invented_result(fused: float = 0.5, dense: float = 2.0, visible_share: float = 0.4, scope: str = "encoder"):
    seconds = {
        NATIVE: [fused * 1.1, fused, fused * 0.8],
        MASKED[0]: [3.0, 3.0, 3.0],
        MASKED[1]: [2.5, 2.5, 2.5],
        DENSE[0]: [dense] * 3,
        DENSE[1]: [dense * 2] * 3,
    }
    memory = {NATIVE: 300, MASKED[0]: 500, MASKED[1]: 1000}
    return compare(scope, seconds, memory, batch=8, visible_share=visible_share, table_seconds=0.02)


def test_ratios():
    result = invented_result()
    fused, contiguous, channels_last, dense, slow_dense = result.rows
    assert (fused.median, fused.fastest, fused.slowest) == (0.5, 0.4, 0.55)
    assert fused.images_per_second == 16
    assert fused.speed_to_masked_dense == 5  # to the faster of its two formats
    assert fused.speed_to_dense == 4
    assert result.floor_seconds == pytest.approx(0.8)
    assert fused.ratio_to_floor == pytest.approx(0.625)
    assert fused.activation_ratio == pytest.approx(0.3)  # to the same format as the time
    assert dense.activation_bytes is None and dense.activation_ratio is None
    assert [row.baseline for row in result.rows] == [False, False, True, True, False]
    assert contiguous.speed_to_masked_dense == pytest.approx(2.5 / 3)
    assert slow_dense.speed_to_dense == 0.5
    assert result.tables is not None and result.tables.share == pytest.approx(0.04)
    assert result.fastest_row("masked_dense") == channels_last


def test_without_dense_backends_there_are_no_ratios():
    result = compare("encoder", {MINKOWSKI: [1.0]}, {}, batch=2, visible_share=0.4)
    (row,) = result.rows
    assert result.floor_seconds is None and result.tables is None
    assert row.speed_to_masked_dense is row.speed_to_dense is row.ratio_to_floor is row.activation_ratio is None


def test_line_and_its_deviation():
    exact = fit_line([0.1, 0.5, 1.0], [1.2, 2.0, 3.0])
    assert (exact.intercept, exact.slope) == (pytest.approx(1), pytest.approx(2))
    assert exact.deviation == pytest.approx(0, abs=1e-9)
    # by hand, with weights 1, 1 and 1/4: the line is (6 + 3 x) / 7, the last point lies 16/7 above its 12/7
    bent = fit_line([0, 1, 2], [1, 1, 4])
    assert (bent.intercept, bent.slope, bent.deviation) == tuple(map(pytest.approx, (6 / 7, 3 / 7, 4 / 3)))


def invented_sweep(name: str, values: list[float], fused: list[float]) -> Sweep:
    reports = []
    for case, seconds in zip(cases_of(TINY, name, values, ["encoder"]), fused):
        result = invented_result(seconds)
        reports.append(Report(describe_machine("cpu"), case, case.visible_patches, case.patches, 3, 0, [result]))
    return Sweep(name, values, reports)


def test_sweep_of_the_mask_fits_a_line_through_the_visible_share():
    result = invented_sweep("mask_ratio", [0.75, 0.5, 0.0], [0.5, 1.0, 2.2])  # shares 0.25, 0.5, 1
    assert result.shares() == [0.25, 0.5, 1.0]
    assert result.medians("encoder", "dense") == [2.0, 2.0, 2.0]  # the faster format
    text = format_sweep(result)
    line = result.line("encoder")
    assert line is not None
    assert f"{line.deviation:.1%}" in text and "1.10 × dense" in text
    assert result.as_dict()["native_lines"]["encoder"]["slope"] == line.slope
    assert draw_sweep(result).startswith(b"\x89PNG")


def test_only_the_mask_is_fitted_and_only_from_three_points():
    assert invented_sweep("batch", [1, 2, 4], [1.0, 2.0, 4.0]).line("encoder") is None
    assert invented_sweep("mask_ratio", [0.5, 0.0], [1.0, 2.0]).line("encoder") is None


def test_default_values_of_the_mask_sweep_cover_the_shares():
    shares = [case.visible_share for case in cases_of(Case(), "mask_ratio", SWEEPS["mask_ratio"], ["encoder"])]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.1, abs=0.01) and shares[-1] == 1


def test_all_backends_in_both_scopes():
    units: list[str] = []
    options = {"runs": 2, "warmup": 0, "memory": False}
    report = measure(TINY, SCOPES, BACKENDS, advance=units.append, **options)
    assert [result.scope for result in report.scopes] == list(SCOPES)
    assert (report.visible_patches, report.patches) == (2, 4)
    for result in report.scopes:
        modes = [(row.backend, row.memory_format, row.compiled) for row in result.rows]
        assert modes == [NATIVE, MINKOWSKI, *MASKED, *DENSE]
        assert all(len(row.seconds) == 2 and min(row.seconds) > 0 for row in result.rows)
        assert sum(row.baseline for row in result.rows) == 2
    encoder, step = report.scopes
    assert encoder.tables is not None and encoder.tables.seconds > 0 and step.tables is None
    assert len(units) == count_units(TINY, SCOPES, BACKENDS, **options)
    text = format_report(report)
    for backend in BACKENDS:
        assert text.count(f"\n{backend} ") == (2 if backend in sparse.BACKENDS else 4)
    for version in ("torch", "torchvision", "MinkowskiEngine", "Python"):
        assert f"{version} {report.machine.versions[version]}" in text
    assert json.loads(json.dumps(dataclasses.asdict(report)))["scopes"][0]["rows"][0]["backend"] == "native"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", variants_of(BACKENDS), ids=str)
@pytest.mark.parametrize("encoder", ["resnet18", *CONVNEXTS])
def test_a_pass_reaches_every_parameter(encoder, scope, variant):
    workload = Workload(dataclasses.replace(TINY, encoder=encoder), scope, variant)
    workload.run()
    assert all(parameter.grad is not None for parameter in workload.model.parameters())
    workload.clear()
    assert all(parameter.grad is None for parameter in workload.model.parameters())


def test_every_pass_builds_its_pyramid(monkeypatch):
    built = []

    class Counted(sparse.Pyramid):
        def __init__(self, *arguments: object) -> None:
            built.append(arguments[2:])
            super().__init__(*arguments)

    workload = Workload(TINY, "encoder", NATIVE)
    monkeypatch.setattr(sparse, "Pyramid", Counted)
    workload.run()
    workload.run()
    assert built == [("native", torch.device("cpu"))] * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_dtypes_compute_in_themselves(dtype):
    workload = Workload(dataclasses.replace(TINY, dtype=dtype), "encoder", DENSE[0])
    seen = set()
    workload.model.get_submodule("layer4.1.conv2").register_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype)
    )
    workload.run()
    assert seen == {getattr(torch, dtype)}


@pytest.mark.parametrize("encoder", ["resnet18", *CONVNEXTS])
def test_dense_step_is_the_simulation_with_everything_visible(encoder):
    dense, masked = DenseSparK(encoder, 32).double(), MaskedDenseSparK(headless(encoder), decoder_width=32).double()
    randomise(masked)
    state = {name.replace("encoder.network.", "encoder."): value for name, value in masked.state_dict().items()}
    dense.load_state_dict({name: value for name, value in state.items() if not name.endswith("mask_token")})
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(2, 2, 3, dtype=torch.bool)
    assert relative_error(dense.predict(images, everything), masked.predict(images, everything)) < 1e-9


@pytest.mark.parametrize("encoder", ["resnet18", "convnextv2_atto"])
def test_tables_are_those_that_a_pass_asks_for(encoder):
    case = dataclasses.replace(TINY, encoder=encoder)
    calls = calls_of_a_pass(case)
    assert len(calls) == len(set(calls)) > 0
    _, visible = case.draw()
    neighbours = sparse.Pyramid(visible, case.patch_size, "native").neighbours
    built = [getattr(neighbours, method)(*arguments) for method, arguments in calls]
    again = [getattr(neighbours, method)(*arguments) for method, arguments in calls]
    assert all(first is second for first, second in zip(built, again) if isinstance(first, torch.Tensor))


def test_no_cuda_device_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu"):
        dataclasses.replace(TINY, device="cuda").check(["encoder"])
