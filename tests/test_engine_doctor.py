"""The doctor passes a right engine, names a wrong layer, and stays calm without an engine."""

import re
import subprocess
import sys

import pytest
import torch

from spark_me import sparse
from spark_me.engine import checks, doctor, installed_version
from spark_me.engine.checks import Case, Variant, cases_for, layers, run_checks, variants_for
from spark_me.engine.doctor import run_doctor

CHECKS = [
    "conv 1×1",
    "conv 3×3",
    "conv 7×7 stride 2",
    "conv 3×3 stride 2",
    "conv 1×1 stride 2",
    "conv 2×2 stride 2",
    "conv 4×4 stride 4",
    "conv 3×3 groups 2",
    "conv 3×3 dilation 2",
    "depthwise 7×7",
    "max-pool 3×3 stride 2",
    "average pool 3×3 stride 2",
    "average pool 2×2 stride 2",
    "batch norm",
    "layer norm",
    "response norm",
]
SMALL_CASES = [case for case in cases_for("cuda") if case.sites() < 10_000]
LINE = re.compile(r"(ok|MISMATCH|FAILED) (.+) \(cpu, (minkowski|native), (float\d\d)\): (.*)")


def verdicts(text):
    """{check: "ok", "MISMATCH" or "FAILED"} of what the doctor printed."""
    matches = [LINE.fullmatch(line) for line in text.splitlines()]
    return {match[2]: match[1] for match in matches if match}


def test_the_installed_engine_passes(capsys):
    assert run_doctor() == 0
    text = capsys.readouterr().out
    assert verdicts(text) == dict.fromkeys(CHECKS, "ok")
    for name in ("Python", "torch", "torchvision", "MinkowskiEngine", "BLAS", "compiler", "threads", "CUDA"):
        assert any(line.startswith(name) for line in text.splitlines()), name


@pytest.mark.gpu
def test_the_installed_engine_passes_on_the_gpu(capsys):
    assert run_doctor() == 0, capsys.readouterr().out


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_both_backends_and_dtypes_pass_the_cases_of_a_gpu(case):
    results = list(run_checks("cpu", variants_for("cuda"), [case]))
    assert len(results) == 4 * len(CHECKS)
    assert [result for result in results if not result.ok] == []


def test_the_cases_of_a_gpu_reach_many_blocks_and_both_ways_of_convolving():
    cases = {case.name: case for case in cases_for("cuda")}
    largest = max(cases.values(), key=Case.sites)
    assert largest.sites() > 100_000
    assert {len(case.visible) for case in cases.values()} >= {1, 64}
    assert len({case.stride for case in cases.values()}) > 2
    # The engine multiplies where the rows lie for few channels or sites, and gathers them first for many.
    assert min(max(case.channels) for case in cases.values()) < 20
    assert any(case.sites() > 74_556 and min(case.channels) > 20 and case.channels[1] > 40 for case in cases.values())
    borders = cases["empty borders"].visible
    assert not borders[:, 0].any()
    assert not borders[:, :, -1].any()
    assert borders.flatten(1).any(1).all()


def test_maps_leave_no_doubt_which_maximum_is_the_largest():
    for case in cases_for("cuda"):
        maps = case.draw_maps()
        assert torch.equal(maps.float().double(), maps)
        ordered = maps.flatten(2).sort(dim=2).values
        assert (ordered.diff(dim=2) > 0).all()


class TransposedConv(sparse.Conv2d):
    """Takes the offsets of a 3×3 kernel with x fastest."""

    def forward(self, x):
        if self.kernel_size == (3, 3):
            self.weight.data = self.weight.data.transpose(2, 3)
        return super().forward(x)


class WrongGradientConv(sparse.Conv2d):
    """Right forward, wrong weight gradient."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.weight.register_hook(lambda grad: grad * (1 + 1e-6))


class UnmaskedPool(sparse.MaxPool2d):
    """Takes empty sites as zero, as dense pooling would."""

    def forward(self, x):
        pooled = super().forward(x)
        return sparse.with_features(pooled, pooled.F.clamp(min=0))


class SlowBatchNorm(sparse.BatchNorm2d):
    """Another momentum: only the running statistics differ."""

    def __init__(self, channels):
        super().__init__(channels, momentum=0.01)


@pytest.mark.parametrize(
    ("layer", "wrong", "named"),
    [
        ("Conv2d", TransposedConv, {name for name in CHECKS if name.startswith("conv 3×3")}),
        ("Conv2d", WrongGradientConv, {name for name in CHECKS if name.startswith(("conv", "depthwise"))}),
        ("MaxPool2d", UnmaskedPool, {"max-pool 3×3 stride 2"}),
        ("BatchNorm2d", SlowBatchNorm, {"batch norm"}),
    ],
)
def test_a_wrong_layer_is_named(monkeypatch, capsys, layer, wrong, named):
    monkeypatch.setattr(sparse, layer, wrong)
    assert run_doctor() == 1
    assert {name for name, verdict in verdicts(capsys.readouterr().out).items() if verdict == "MISMATCH"} == named


def one_layer(name):
    return tuple(layer for layer in layers() if layer.name == name)


def scaled(factor):
    """A layer norm whose output is multiplied by a factor, of which the number of channels may decide."""

    class Scaled(sparse.LayerNorm):
        def forward(self, x):
            out = super().forward(x)
            return sparse.with_features(out, out.F * factor(out.F.shape[1]))

    return Scaled


UNREPEATABLE = scaled(lambda channels: 1 + 1e-12 * torch.rand((), dtype=torch.float64))


@pytest.mark.parametrize(
    ("wrong", "case", "ok", "repeatable"),
    [
        (scaled(lambda channels: 1.001 if channels > 30 else 1), "empty borders", False, True),
        (scaled(lambda channels: torch.nan if channels == 4 else 1), "mixed masks", False, False),  # the first alone
        (UNREPEATABLE, None, True, False),
    ],
)
def test_the_worst_of_many_cases_counts(monkeypatch, wrong, case, ok, repeatable):
    monkeypatch.setattr(sparse, "LayerNorm", wrong)
    monkeypatch.setattr(checks, "layers", lambda: one_layer("layer norm"))
    (result,) = run_checks("cpu", [Variant("minkowski", torch.float64)], SMALL_CASES)
    assert result.ok == ok
    assert case in (None, result.case)
    assert result.repeatable == repeatable


class Unloadable(sparse.LayerNorm):
    def forward(self, x):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with …")


def test_a_layer_that_cannot_run_ends_the_checks_with_its_case(monkeypatch, capsys):
    monkeypatch.setattr(sparse, "LayerNorm", Unloadable)
    assert run_doctor() == 1
    text = capsys.readouterr().out
    assert verdicts(text) == dict.fromkeys(CHECKS[:-2], "ok") | {"layer norm": "FAILED"}
    assert "layer norm (cpu, minkowski, float64): CUDA error: no kernel image is available, at mixed masks\n" in text


def test_a_difference_between_two_runs_is_told_and_allowed(monkeypatch, capsys):
    monkeypatch.setattr(sparse, "LayerNorm", UNREPEATABLE)
    assert run_doctor() == 0
    assert "two runs differ in their last bits, which is allowed: layer norm (cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("sys.modules['MinkowskiEngine'] = None", ["spark-me engine install"]),
        ("sys.path.insert(0, {folder!r})", ["undefined symbol", "--rebuild"]),  # built for another torch
    ],
)
def test_an_engine_that_is_missing_or_does_not_load_is_one_line(tmp_path, broken, said):
    (tmp_path / "MinkowskiEngine.py").write_text("raise ImportError('_C.so: undefined symbol: _ZN5torch')")
    code = f"import sys\n{broken}\nfrom spark_me.cli import main; sys.exit(main(['doctor']))"
    command = [sys.executable, "-c", code.format(folder=str(tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(part in result.stderr for part in said)


def test_info_tells_what_is_installed_cached_and_planned(monkeypatch, tmp_path, capsys):
    wheel = tmp_path / "wheels" / "0123" / "MinkowskiEngine-0.5.4-cp311.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"x" * 2_000_000)
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path))
    doctor.print_info()
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [
        "installed:",
        "cached:",
        "a build would use:",
    ]
    assert f"MinkowskiEngine {installed_version('MinkowskiEngine')}" in text
    assert "0123  MinkowskiEngine-0.5.4-cp311.whl  2 MB" in text
