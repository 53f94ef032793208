"""The doctor passes a right engine, names a wrong layer, and stays calm without an engine."""

import os
import subprocess
import sys

import pytest
import torch

from spark_me import sparse
from spark_me.engine import info, packages
from spark_me.engine.doctor import run_doctor
from spark_me.errors import EngineError

CHECKS = [
    "conv 1×1",
    "conv 3×3",
    "conv 7×7 stride 2",
    "conv 3×3 stride 2",
    "conv 1×1 stride 2",
    "conv 2×2 stride 2",
    "max-pool 3×3 stride 2",
    "batch norm",
]


def verdicts(text):
    """{check: "ok" or "MISMATCH"} of what the doctor printed."""
    lines = [line.split(" (cpu): max error ")[0].split(" ", 1) for line in text.splitlines() if "(cpu): max" in line]
    return {name: verdict for verdict, name in lines}


def test_the_installed_engine_passes(capsys):
    assert run_doctor() == 0
    text = capsys.readouterr().out
    assert verdicts(text) == dict.fromkeys(CHECKS, "ok")
    for name in ("Python", "torch", "torchvision", "MinkowskiEngine", "BLAS", "compiler", "threads", "CUDA"):
        assert any(line.startswith(name) for line in text.splitlines()), name


class TransposedConv(sparse.Conv2d):
    """Takes the offsets of a 3×3 kernel with x fastest."""

    def forward(self, x):
        if self.kernel_size == 3:
            self.kernel.data = self.kernel.data[torch.arange(9).view(3, 3).T.flatten()]
        return super().forward(x)


class WrongGradientConv(sparse.Conv2d):
    """Right forward, wrong weight gradient."""

    def __init__(self, *args):
        super().__init__(*args)
        self.kernel.register_hook(lambda grad: grad * (1 + 1e-6))


class UnmaskedPool(sparse.MaxPool2d):
    """Takes empty sites as zero, as dense pooling would."""

    def forward(self, x):
        pooled = super().forward(x)
        return sparse.with_features(pooled, pooled.F.clamp(min=0))


class SlowBatchNorm(sparse.BatchNorm):
    """Another momentum: only the running statistics differ."""

    def __init__(self, channels):
        super().__init__(channels, momentum=0.01)


@pytest.mark.parametrize(
    ("layer", "wrong", "named"),
    [
        ("Conv2d", TransposedConv, {"conv 3×3", "conv 3×3 stride 2"}),
        ("Conv2d", WrongGradientConv, {name for name in CHECKS if name.startswith("conv")}),
        ("MaxPool2d", UnmaskedPool, {"max-pool 3×3 stride 2"}),
        ("BatchNorm", SlowBatchNorm, {"batch norm"}),
    ],
)
def test_a_wrong_layer_is_named(monkeypatch, capsys, layer, wrong, named):
    monkeypatch.setattr(sparse, layer, wrong)
    assert run_doctor() == 1
    assert {name for name, verdict in verdicts(capsys.readouterr().out).items() if verdict == "MISMATCH"} == named


def run_without_engine(code, **environment):
    """`spark-me doctor` in a fresh process, after `code`."""
    code += "\nfrom spark_me.cli import main; sys.exit(main(['doctor']))"
    return subprocess.run(
        [sys.executable, "-c", "import sys\n" + code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_missing_engine_is_one_line():
    result = run_without_engine("sys.modules['MinkowskiEngine'] = None")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "spark-me engine install" in result.stderr


def test_an_engine_of_another_torch_is_one_line(tmp_path):
    (tmp_path / "MinkowskiEngine.py").write_text("raise ImportError('_C.so: undefined symbol: _ZN5torch')")
    result = run_without_engine(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "undefined symbol" in result.stderr
    assert "--rebuild" in result.stderr


def test_info_tells_what_is_installed_cached_and_planned(monkeypatch, tmp_path, capsys):
    wheel = tmp_path / "wheels" / "0123" / "MinkowskiEngine-0.5.4-cp311.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"x" * 2_000_000)
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path))
    info.print_info()
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [
        "installed:",
        "cached:",
        "a build would use:",
    ]
    assert f"MinkowskiEngine {packages.installed_version('MinkowskiEngine')}" in text
    assert "0123  MinkowskiEngine-0.5.4-cp311.whl  2 MB" in text


def test_a_failed_package_installation_gives_the_installers_last_words(monkeypatch, tmp_path):
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\necho resolving\necho '  error: no disk' >&2\nexit 2\n")
    uv.chmod(0o755)
    monkeypatch.setattr(packages, "scripts_path", lambda: str(tmp_path))
    with pytest.raises(EngineError, match="engine.whl cannot be installed into .*: error: no disk"):
        packages.install_packages("/cache/engine.whl", reinstall=True)
