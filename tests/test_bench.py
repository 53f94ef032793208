"""The benchmark's figures: timed by a fake clock, computed from invented times, and real ones of tiny cases."""

import dataclasses
import io
import json
import math

import pytest
import torch
from conftest import randomise, relative_error
from tiny_bench import DENSE, MASKED, MINKOWSKI, NATIVE, TINY

from spark_me import sparse
from spark_me.bench.report import format_record
from spark_me.bench.sweep import cases_of, draw_sweep, fit_line, medians_of, shares_of, sweep_of
from spark_me.bench.timing import (
    Record,
    Tables,
    case_on_machine,
    compare,
    count_units,
    fastest_rows,
    measure,
    time_interleaved,
)
from spark_me.bench.workloads import (
    BACKENDS,
    SCOPES,
    Case,
    DenseSparK,
    MaskedDenseSparK,
    Workload,
    headless,
    variants_of,
)
from spark_me.errors import UserError
from spark_me.train.optimizers import Lamb

CONVNEXTS = ("convnext_tiny", "convnextv2_atto")
TWO_OF_FIVE = dataclasses.replace(TINY, batch=8, image_size=(32, 160), mask_ratio=0.6)


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


def invented_figures(fused: float = 0.5, dense: float = 2.0) -> Record:
    seconds = {
        NATIVE: [fused * 1.1, fused, fused * 0.8],
        MASKED[0]: [3.0, 3.0, 3.0],
        MASKED[1]: [2.5, 2.5, 2.5],
        DENSE[0]: [dense] * 3,
        DENSE[1]: [dense * 2] * 3,
    }
    memory = {NATIVE: 300, MASKED[0]: 500, MASKED[1]: 1000}
    return compare(TWO_OF_FIVE, seconds, memory, [0.01, 0.02, 0.09])


def test_ratios():
    result = invented_figures()
    fused, contiguous, channels_last, dense, slow_dense = result["rows"]
    assert (fused["median"], fused["fastest"], fused["slowest"]) == (0.5, 0.4, 0.55)
    assert fused["images_per_second"] == 16
    assert fused["speed_to_masked_dense"] == 5  # to the faster of its two formats
    assert fused["speed_to_dense"] == 4
    assert result["floor_seconds"] == pytest.approx(0.8)
    assert fused["ratio_to_floor"] == pytest.approx(0.625)
    assert fused["activation_ratio"] == pytest.approx(0.3)  # to the same format as the time
    assert dense["activation_bytes"] is None and dense["activation_ratio"] is None
    assert [row["baseline"] for row in result["rows"]] == [False, False, True, True, False]
    assert contiguous["speed_to_masked_dense"] == pytest.approx(2.5 / 3)
    assert slow_dense["speed_to_dense"] == 0.5
    assert result["tables"]["share"] == pytest.approx(0.04)
    assert fastest_rows(result)["masked_dense"] == channels_last


def test_without_dense_backends_there_are_no_ratios():
    result = compare(TWO_OF_FIVE, {MINKOWSKI: [1.0]}, {})
    (row,) = result["rows"]
    assert result["floor_seconds"] is None and result["tables"] is None
    ratios = ("speed_to_masked_dense", "speed_to_dense", "ratio_to_floor", "activation_ratio")
    assert [row[ratio] for ratio in ratios] == [None] * 4


def test_line_and_its_deviation():
    exact = fit_line([0.1, 0.5, 1.0], [1.2, 2.0, 3.0])
    assert (exact["intercept"], exact["slope"]) == (pytest.approx(1), pytest.approx(2))
    assert exact["deviation"] == pytest.approx(0, abs=1e-9)
    # by hand, with weights 1, 1 and 1/4: the line is (6 + 3 x) / 7, the last point lies 16/7 above its 12/7
    bent = fit_line([0, 1, 2], [1, 1, 4])
    assert bent == pytest.approx({"intercept": 6 / 7, "slope": 3 / 7, "deviation": 4 / 3})


def invented_sweep(name: str, values: list[float], fused: list[float]) -> Record:
    reports = []
    for case, seconds in zip(cases_of(TINY, name, values), fused):
        counts = {"visible_patches": case.visible_patches, "patches": case.patches, "runs": 3, "warmup": 0}
        result = {"scope": "encoder", **invented_figures(seconds), "left_out": {}}
        reports.append({**case_on_machine(case), **counts, "scopes": [result]})
    return sweep_of(name, reports)


def picture_of(record: Record) -> bytes:
    picture = io.BytesIO()
    draw_sweep(record, picture)
    return picture.getvalue()


def test_sweep_of_the_mask_fits_a_line_through_the_visible_share():
    result = invented_sweep("mask_ratio", [0.75, 0.5, 0.0], [0.5, 1.0, 2.2])  # shares 0.25, 0.5, 1
    assert result["values"] == [0.75, 0.5, 0.0] and shares_of(result["reports"]) == [0.25, 0.5, 1.0]
    assert medians_of(result["reports"])["encoder"]["dense"] == [2.0, 2.0, 2.0]  # the faster format
    text = format_record(result)
    line = result["native_lines"]["encoder"]
    assert line == fit_line([0.25, 0.5, 1.0], [0.5, 1.0, 2.2])
    assert f"{line['deviation']:.1%}" in text and "1.10 × dense" in text
    assert picture_of(result).startswith(b"\x89PNG")


def test_a_backend_that_fails_at_one_value_leaves_a_gap():
    result = invented_sweep("image_size", [64, 128], [0.5, 1.0])
    (second,) = result["reports"][1]["scopes"]
    second["rows"] = [row for row in second["rows"] if row["backend"] != "masked_dense"]
    medians = medians_of(result["reports"])["encoder"]
    assert result["values"] == [64, 128] and medians["native"] == [0.5, 1.0]
    assert medians["masked_dense"][0] == 2.5 and math.isnan(medians["masked_dense"][1])
    (line,) = (line for line in format_record(result).splitlines() if line.split()[:1] == ["128"])
    assert line.split()[1:] == ["0.500", "1.0000", "n/a", "2.0000"]
    assert picture_of(result).startswith(b"\x89PNG")


def test_only_the_mask_is_fitted_and_only_from_three_points():
    assert invented_sweep("batch", [1, 2, 4], [1.0, 2.0, 4.0])["native_lines"] == {"encoder": None}
    assert invented_sweep("mask_ratio", [0.5, 0.0], [1.0, 2.0])["native_lines"] == {"encoder": None}


def test_default_values_of_the_mask_sweep_cover_the_shares():
    shares = [case.visible_patches / case.patches for case in cases_of(Case(), "mask_ratio", None)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.1, abs=0.01) and shares[-1] == 1


def test_all_backends_in_all_scopes():
    units: list[str] = []
    options = {"runs": 2, "warmup": 0, "memory": False}
    variants = variants_of(BACKENDS)
    report = measure(TINY, list(SCOPES), variants, advance=units.append, **options)
    assert [result["scope"] for result in report["scopes"]] == list(SCOPES)
    assert (report["visible_patches"], report["patches"]) == (2, 4)
    for result in report["scopes"]:
        rows = result["rows"]
        modes = [(row["backend"], row["memory_format"], row["compiled"]) for row in rows]
        assert modes == [NATIVE, MINKOWSKI, *MASKED, *DENSE]
        assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
        assert sum(row["baseline"] for row in rows) == 2
    encoder, *others = report["scopes"]
    assert encoder["tables"]["seconds"] > 0 and all(each["tables"] is None for each in others)
    assert len(units) == count_units(TINY, list(SCOPES), variants, **options)
    text = format_record(report)
    for backend in BACKENDS:
        assert text.count(f"\n{backend} ") == len(SCOPES) * (1 if backend in sparse.BACKENDS else 2)
    for version in ("torch", "torchvision", "MinkowskiEngine", "Python"):
        assert f"{version} {report['machine']['versions'][version]}" in text
    assert json.loads(json.dumps(report))["scopes"][0]["rows"][0]["backend"] == "native"


@pytest.mark.parametrize("scope", ["encoder", "step"])
@pytest.mark.parametrize("variant", variants_of(BACKENDS), ids=str)
@pytest.mark.parametrize("encoder", ["resnet18", *CONVNEXTS])
def test_a_pass_reaches_every_parameter(encoder, scope, variant):
    workload = Workload(dataclasses.replace(TINY, encoder=encoder), scope, variant)
    workload.run()
    assert all(parameter.grad is not None for parameter in workload.model.parameters())
    workload.clear()
    assert all(parameter.grad is None for parameter in workload.model.parameters())


@pytest.mark.parametrize("variant", variants_of(BACKENDS), ids=str)
def test_training_takes_the_optimizers_step_and_leaves_the_weights(variant, monkeypatch):
    workload = Workload(TINY, "training", variant)
    before = [parameter.detach().clone() for parameter in workload.model.parameters()]
    norms, step = [], Lamb.step

    def noted(optimizer):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.stack([parameter.grad.norm() for parameter in parameters]).norm().item())
        step(optimizer)

    monkeypatch.setattr(Lamb, "step", noted)
    workload.run()
    assert len(norms) == 1 and 0 < norms[0] <= 5.001  # clipped before
    assert all(torch.equal(old, new) for old, new in zip(before, workload.model.parameters(), strict=True))


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


@pytest.mark.parametrize("decoder", ["unet", "block"])
@pytest.mark.parametrize("encoder", ["resnet18", *CONVNEXTS])
def test_dense_step_is_the_simulation_with_everything_visible(encoder, decoder):
    dense = DenseSparK(encoder, 32, decoder).double()
    masked = MaskedDenseSparK(headless(encoder), decoder_width=32, decoder=decoder).double()
    randomise(masked)
    state = {name.replace("encoder.network.", "encoder."): value for name, value in masked.state_dict().items()}
    dense.load_state_dict({name: value for name, value in state.items() if not name.endswith("mask_token")})
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(2, 2, 3, dtype=torch.bool)
    assert relative_error(dense.predict(images, everything), masked.predict(images, everything)) < 1e-9


@pytest.mark.parametrize("encoder", ["resnet18", "convnextv2_atto"])
def test_tables_are_those_that_a_pass_asks_for(encoder):
    case = dataclasses.replace(TINY, encoder=encoder)
    calls = Tables(case).calls
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
