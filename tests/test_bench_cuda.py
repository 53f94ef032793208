"""What the benchmark does on a GPU: modes of running, failures that leave the others, largest batches, tables."""

import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch
from conftest import relative_error
from tiny_bench import COMPILED, NATIVE, TINY
from tiny_bench import MASKED as EAGER
from torch import nn
from torchvision.models.resnet import BasicBlock

from spark_me.bench import bench, timing
from spark_me.bench.report import format_record, markdown_of
from spark_me.bench.sweep import STEP, find_largest_batches, search
from spark_me.bench.timing import Record, case_on_machine, compare
from spark_me.bench.workloads import Case, MaskedDenseSparK, Variant, Workload, variants_of
from spark_me.cli import main
from spark_me.devices import float32_products
from spark_me.errors import EngineError, UserError
from spark_me.trace import trace

pytestmark = pytest.mark.usefixtures("one_thread")


def settings() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("dtype", "tf32"), [("float32", False), ("tf32", True), ("bfloat16", False)])
def test_precision_is_set_for_a_pass_and_restored(dtype, tf32, before):
    case = dataclasses.replace(TINY, dtype=dtype)
    with float32_products(tf32=before):
        outside = settings()
        with case.computing():
            assert settings() == (tf32, tf32, True)
        assert settings() == outside and outside[:2] == (before, before)


def test_dense_backends_run_compiled_besides():
    assert variants_of(["native", "masked_dense"], compiled=True) == [NATIVE, *EAGER, COMPILED]
    assert variants_of(["native", "masked_dense"]) == [NATIVE, *EAGER]
    assert str(COMPILED) == "masked_dense (channels_last, compiled)"


def short_resnet() -> nn.Module:
    """Every operation of a ResNet, at strides 2, 4 and 8: compiling takes as long as there are operations."""
    stem = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return nn.Sequential(nn.Sequential(*stem), BasicBlock(8, 8), BasicBlock(8, 16, 2, shortcut))


@pytest.mark.parametrize("training", [True, False])
def test_the_simulation_compiles_whole_and_computes_the_same(training):
    """Traced for a compiler, it is one graph; the simulation's batch norm takes another way there."""
    torch.manual_seed(0)
    eager, traced = (
        MaskedDenseSparK(trace(short_resnet()), decoder_width=32).double().train(training) for _ in range(2)
    )
    traced.load_state_dict(eager.state_dict())
    traced.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 0]]]).bool()
    losses = [model(images, visible) for model in (eager, traced)]
    for loss in losses:
        loss.backward()
    assert relative_error(losses[1], losses[0]) < 1e-9
    for one, other in zip(traced.parameters(), eager.parameters()):
        assert relative_error(one.grad, other.grad) < 1e-7
    for one, other in zip(traced.buffers(), eager.buffers()):
        assert relative_error(one.double(), other.double()) < 1e-9


class Failing(Workload):
    """Variants fail as they do on a GPU."""

    errors: dict[Variant, Exception] = {}

    def __init__(self, case: Case, scope: str, variant: Variant) -> None:
        if variant in self.errors:
            raise self.errors[variant]
        super().__init__(case, scope, variant._replace(compiled=False))


def test_a_variant_that_fails_leaves_the_others(monkeypatch):
    memory_error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    errors = {EAGER[0]: memory_error, COMPILED: RuntimeError("Failed to find C compiler.\nPlease specify one")}
    monkeypatch.setattr(Failing, "errors", errors)
    monkeypatch.setattr(timing, "Workload", Failing)
    monkeypatch.setattr(timing, "peak_on_gpu", lambda workload: 7 * 2**20)
    announced: list[str] = []
    workloads, peaks, left_out = timing.try_all(TINY, "encoder", [NATIVE, *EAGER, COMPILED], announced.append)
    assert list(workloads) == list(peaks) == [NATIVE, EAGER[1]]
    assert set(peaks.values()) == {7 * 2**20}
    assert left_out == {
        str(EAGER[0]): "does not fit into the GPU's memory",
        str(COMPILED): "does not compile (RuntimeError: Failed to find C compiler.)",
    }
    assert len(announced) == 4
    monkeypatch.setattr(Failing, "errors", {EAGER[0]: EngineError("the installed engine is built for the CPU")})
    workloads, _, left_out = timing.try_all(TINY, "encoder", [NATIVE, EAGER[0]], announced.append)
    assert list(workloads) == [NATIVE]
    assert left_out == {str(EAGER[0]): "the installed engine is built for the CPU"}
    monkeypatch.setattr(Failing, "errors", {NATIVE: RuntimeError("a mistake")})
    with pytest.raises(RuntimeError, match="a mistake"):
        timing.try_all(TINY, "encoder", [NATIVE], announced.append)


@pytest.mark.parametrize("first", [1, 8, 64, 5000])
@pytest.mark.parametrize("most", [0, 7, 8, 9, 100, 1000, 1024])
def test_search_finds_the_largest_multiple(most, first):
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= most

    assert search(fits, first) == most // STEP * STEP
    assert len(tried) == len(set(tried)) < 22 and all(batch % STEP == 0 for batch in tried)


def invented_report(dtype: str = "bfloat16") -> Record:
    seconds = {NATIVE: [0.1, 0.11, 0.12], EAGER[0]: [0.5] * 3, EAGER[1]: [0.4] * 3, COMPILED: [0.22] * 3}
    memory = {NATIVE: 3 * 2**30, EAGER[0]: 9 * 2**30, EAGER[1]: 8 * 2**30, COMPILED: 6 * 2**30}
    case = dataclasses.replace(TINY, encoder="resnet50", batch=256, dtype=dtype, device="cuda")
    left_out = {"dense (channels_last, compiled)": "does not compile (RuntimeError: no)"}
    result = {"scope": "encoder", **compare(case, seconds, memory), "left_out": left_out}
    record = {"case": dataclasses.asdict(case), "machine": case_on_machine(TINY)["machine"]}
    record["machine"] |= {"gpu": "A GPU", "date": "2026-01-02T03:04:05+00:00", "tf32": {}}
    return {**record, "visible_patches": 20, "patches": 49, "runs": 3, "warmup": 2, "scopes": [result]}


def invented_batches() -> Record:
    found = [
        ("native", None, 1024, "memory"),
        ("minkowski", None, 0, "RuntimeError: no"),
        ("masked_dense", "channels_last", 400, "memory"),
    ]
    largest = [dict(zip(("backend", "memory_format", "batch", "limit"), each)) for each in found]
    report = invented_report()
    first = {name: report[name] for name in ("machine", "case")}
    return {**first, "scope": "encoder", "gpu_bytes": 80 * 2**30, "largest": largest}


def test_the_fastest_manner_is_the_yardstick():
    (result,) = invented_report()["scopes"]
    assert [row["baseline"] for row in result["rows"]] == [False, False, False, True]
    assert result["rows"][0]["speed_to_masked_dense"] == pytest.approx(2.0)
    assert result["rows"][0]["activation_ratio"] == pytest.approx(0.5)
    text = format_record(invented_report())
    assert "channels_last, compiled *" in text
    assert "dense (channels_last, compiled): does not compile (RuntimeError: no)" in text


def test_files_become_tables(tmp_path, capsys):
    contents = {"a": invented_report(), "b": invented_report("tf32"), "c": invented_batches()}
    files = [tmp_path / f"{name}.json" for name in contents]
    for file, content in zip(files, contents.values()):
        file.write_text(json.dumps(content))
    assert main(["bench", "--table", *map(str, files)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("2026-01-02, A GPU; ") and text.count("A GPU") == 1
    fused = "| resnet50 | {} | 256 | `native` | - | 110.0 | 100.0–120.0 | 2327 | 2.00× | 3.00 | 0.50× |"
    masked = "| resnet50 | {} | 256 | `masked_dense` | channels_last, compiled | 220.0 | 220.0–220.0 | 1164 | 1.00× | 6.00 | 1.00× |"  # noqa: E501
    expected = [line.format(dtype) for dtype in ("bfloat16", "tf32") for line in (fused, masked)]
    assert [line for line in lines if " 256 " in line] == expected
    assert "| resnet50 | encoder | bfloat16 | `native` | - | 1024 | 2.56× | memory, 80 GiB |" in lines
    assert "| resnet50 | encoder | bfloat16 | `minkowski` | - | 0 | 0.00× | RuntimeError: no |" in lines
    assert text.count("does not compile") == 2
    assert "80.0 GiB" in format_record(invented_batches())


@pytest.mark.parametrize("content", ["", "[]", '{"reports": []}'])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UserError, match="other.json"):
        markdown_of([tmp_path / "other.json"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
def test_all_backends_on_a_gpu(dtype, tmp_path, capsys):
    case = dataclasses.replace(TINY, device="cuda", dtype=dtype)
    options = {"backends": ["native", "minkowski", "masked_dense", "dense"], "runs": 2, "warmup": 1, "memory": True}
    bench(case, "both", tmp_path / "all.json", **options, compiled=dtype == "bfloat16")
    content = json.loads((tmp_path / "all.json").read_text())
    for result in content["scopes"]:
        assert not result["left_out"]
        assert len(result["rows"]) == (8 if dtype == "bfloat16" else 6)
        assert all(row["activation_bytes"] > 0 for row in result["rows"])
    assert set(content["machine"]["tf32"].values()) == {dtype == "tf32"}
    assert "`native`" in markdown_of([tmp_path / "all.json"])


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A fiftieth of the GPU's."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_says_so(little_memory):
    case = dataclasses.replace(TINY, device="cuda", batch=512, image_size=(448, 448))
    with pytest.raises(UserError, match="does not fit into the GPU's memory"):
        bench(case, "encoder", backends=["native"], runs=1, warmup=0, memory=True)


@pytest.mark.gpu
def test_largest_batch_on_a_gpu(little_memory):
    case = dataclasses.replace(TINY, device="cuda", image_size=(224, 224))
    found = find_largest_batches(case, "encoder", [NATIVE, *EAGER, COMPILED], print)
    assert [each["backend"] for each in found["largest"]] == ["native", "masked_dense"]
    assert all(each["batch"] >= STEP and each["limit"] == "memory" for each in found["largest"])
