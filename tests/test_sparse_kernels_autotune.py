"""Which algorithm runs: measured once for every shape, pinned, and the same results whichever it is."""

import logging
import math

import pytest
import torch
from conftest import relative_error
from torch.utils.checkpoint import checkpoint

from spark_me import sparse
from spark_me.densify import Densify
from spark_me.sparse.kernels import autotune
from spark_me.sparse.kernels.autotune import Choices


class Recorder:
    """Algorithms that note when they run outside of measuring, and a timer that gives each a set time."""

    def __init__(self, milliseconds):
        self.ran = []
        self.timed = []
        self.milliseconds = milliseconds
        self.algorithms = {name: self.algorithm(name) for name in milliseconds}

    def algorithm(self, name):
        def compute(rows, kernel):
            self.ran.append(name)
            return rows @ kernel

        return compute

    def timer(self, work):
        self.ran.clear()  # what was checked before
        work()
        (name,) = self.ran
        self.ran.clear()
        self.timed.append(name)
        if self.milliseconds[name] is None:
            raise torch.cuda.OutOfMemoryError
        return self.milliseconds[name]


def inputs(rows=10, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(rows, 3, dtype=dtype, requires_grad=True), torch.randn(3, 4, dtype=dtype, requires_grad=True)


def test_the_fastest_is_measured_once_for_a_shape():
    recorder = Recorder({"a 64": 3.0, "a 128": 1.0, "b": 2.0})
    choices = Choices(recorder.timer)
    for rows in (10, 12, 16):  # counted up to the same power of two
        choices.run("convolution", (1, 3), recorder.algorithms, *inputs(rows))
    assert recorder.timed == ["a 64", "a 128", "b"]
    assert recorder.ran == ["a 128"] * 3
    assert list(choices.measured.values()) == [{"a 64": 3.0, "a 128": 1.0, "b": 2.0}]


def test_another_shape_geometry_dtype_or_need_of_gradients_is_measured_again():
    recorder = Recorder({"a": 1.0, "b": 2.0})
    choices = Choices(recorder.timer)
    choices.run("convolution", (1, 3), recorder.algorithms, *inputs(10))
    choices.run("convolution", (1, 3), recorder.algorithms, *inputs(17))
    choices.run("convolution", (2, 3), recorder.algorithms, *inputs(10))
    choices.run("pooling", (1, 3), recorder.algorithms, *inputs(10))
    choices.run("convolution", (1, 3), recorder.algorithms, *inputs(10, torch.bfloat16))
    with torch.no_grad():
        choices.run("convolution", (1, 3), recorder.algorithms, *inputs(10))
    assert len(choices.measured) == 6
    dtypes = [operation.dtype for operation in choices.measured]
    assert dtypes == ["float32"] * 4 + ["bfloat16", "float32"]
    assert [operation.gradients for operation in choices.measured][-2:] == [(True, True), (False, False)]


def test_measuring_leaves_gradients_and_randomness_alone():
    recorder = Recorder({"a": 1.0, "b": 2.0})
    rows, kernel = inputs()
    state = torch.get_rng_state()
    out = Choices(recorder.timer).run("convolution", (), recorder.algorithms, rows, kernel)
    assert rows.grad is None and kernel.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    out.sum().backward()
    assert relative_error(rows.grad, kernel.sum(1).expand_as(rows)) < 1e-4


def test_measuring_is_nothing_that_activation_checkpointing_sees():
    """It counts the tensors that a block saves, and measuring happens in the first of its two passes alone."""
    recorder = Recorder({"a": 1.0, "b": 2.0})
    choices = Choices(recorder.timer)
    rows, kernel = inputs()

    def block(rows):
        return choices.run("convolution", (), recorder.algorithms, rows, kernel).relu()

    checkpoint(block, rows, use_reentrant=False).sum().backward()
    assert recorder.timed == ["a", "b"] and recorder.ran == ["a", "a"]
    assert kernel.grad is not None


def test_a_algorithm_without_room_is_not_chosen():
    recorder = Recorder({"a": None, "b": 5.0})
    choices = Choices(recorder.timer)
    choices.run("convolution", (), recorder.algorithms, *inputs())
    assert recorder.ran == ["b"]
    assert list(choices.measured.values()) == [{"a": float("inf"), "b": 5.0}]


def test_a_algorithm_that_fails_is_not_chosen_and_a_line_says_so(caplog):
    recorder = Recorder({"a": 1.0, "b": 5.0})

    def fails(rows, kernel):
        raise ValueError("no such instruction\nand much more")

    algorithms = {"broken 64": fails, **recorder.algorithms}
    choices = Choices(recorder.timer)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            choices.run("convolution", (), algorithms, *inputs())
    assert recorder.ran == ["a", "a"]
    assert [record.message for record in caplog.records] == [
        "broken 64 does not run on this GPU and is left out: ValueError: no such instruction"
    ]
    with pytest.raises(ValueError, match="no such instruction"):  # nothing else to take
        Choices(recorder.timer).run("convolution", (), {"a": fails, "b": fails}, *inputs())


class Faulty(torch.autograd.Function):
    """rows @ kernel, with what a broken kernel might return."""

    @staticmethod
    def forward(ctx, rows, kernel, out, of_rows, of_kernel):
        ctx.save_for_backward(rows, kernel)
        ctx.of_rows, ctx.of_kernel = of_rows, of_kernel
        return out(rows @ kernel)

    @staticmethod
    def backward(ctx, gradient):
        rows, kernel = ctx.saved_tensors
        return ctx.of_rows(gradient @ kernel.T), ctx.of_kernel(rows.T @ gradient), None, None, None


def right(x):
    return x


def without_last_row(x):
    return torch.cat([x[:-1], torch.zeros_like(x[-1:])])


FAULTS = {
    "zeros": torch.zeros_like,
    "NaN": lambda x: torch.full_like(x, torch.nan),
    "one NaN": lambda x: x.index_fill(1, torch.tensor([2]), torch.nan),
    "half": lambda x: x / 2,
    "no last row": without_last_row,
    "infinite": lambda x: x / 0,
    "uninitialised": lambda x: torch.full_like(x, 3e4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", range(3), ids=["output", "gradient of rows", "gradient of the kernel"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_computes_wrongly_is_not_chosen_however_fast(fault, place, dtype, caplog):
    """Also where the inputs at hand hide it: a weight may start at zero."""
    wrong = [FAULTS[fault] if place == each else right for each in range(3)]
    algorithms = {
        "broken 64": lambda rows, kernel: Faulty.apply(rows, kernel, *wrong),
        "sound 64": lambda rows, kernel: Faulty.apply(rows, kernel, right, right, right),
        "reference": torch.matmul,
    }
    times = iter([1.0, 2.0])
    choices = Choices(lambda work: (work(), next(times))[1])
    rows, kernel = inputs(50, dtype)
    with torch.no_grad():
        kernel.zero_()
    with caplog.at_level(logging.WARNING):
        choices.run("convolution", (), algorithms, rows, kernel)
    (measured,) = choices.measured.values()
    assert measured == {"broken 64": float("inf"), "sound 64": 1.0, "reference": 2.0}
    what = f"gradient {place}" if place else "output"
    (message,) = (record.message for record in caplog.records)
    assert message.startswith(f"broken 64 computes wrongly on this GPU and is left out: its {what} is off by ")


def test_the_reference_runs_where_all_else_is_wrong_or_it_has_no_room_to_be_proven():
    recorder = Recorder({"a": 1.0, "b": 2.0})
    wrong = {"zeros": lambda rows, kernel: 0 * (rows @ kernel), "b": recorder.algorithms["b"]}

    def timer(work):
        raise torch.cuda.OutOfMemoryError

    choices = Choices(timer)
    out = choices.run("convolution", (), wrong, *inputs())
    assert list(choices.measured.values()) == [{"zeros": float("inf"), "b": float("inf")}]
    rows, kernel = inputs()
    assert torch.equal(out, rows @ kernel)


def test_the_reference_is_computed_in_float32_without_autocast():
    dtypes = []

    def reference(rows, kernel):
        dtypes.append((rows @ kernel).dtype)
        return rows @ kernel

    with torch.autocast("cpu", torch.bfloat16):
        choices = Choices(lambda work: (work(), 1.0)[1])
        choices.run("convolution", (), {"a": torch.matmul, "b": reference}, *inputs(dtype=torch.bfloat16))
    assert dtypes[0] == torch.float32 and set(dtypes[1:]) == {torch.bfloat16}


@pytest.mark.parametrize(
    "pins, expected",
    [
        (("a 128",), "a 128"),
        (("a",), "a 64"),
        (("absent", "b"), "b"),
        (("b", "a"), "b"),
        (("absent",), "a 64"),
        ((), "a 64"),
    ],
)
def test_a_pinned_algorithm_runs_unmeasured(pins, expected):
    recorder = Recorder({"a 64": 3.0, "a 128": 1.0, "b": 2.0})
    choices = Choices(recorder.timer)
    choices.pinned = pins
    choices.run("convolution", (), recorder.algorithms, *inputs())
    assert recorder.ran == [expected] and not choices.measured


def test_pins_end_with_their_block_and_the_cpu_and_float64_have_no_choice():
    single, double = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.float64)
    assert not autotune.is_open(single)
    with pytest.raises(KeyError), sparse.choose("tiles"):
        assert autotune.is_open(single) and not autotune.is_open(double)
        raise KeyError
    assert not autotune.is_open(single)


def test_without_triton_kernels_run_on_no_gpu_and_a_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(autotune, "triton_available", lambda: False)
    autotune._triton_is_there.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not autotune.kernels_run_on(torch.device("cuda"))
        assert not autotune.kernels_run_on(torch.device("cuda"))
    autotune._triton_is_there.cache_clear()
    assert [record.message[:23] for record in caplog.records] == ["Triton is not installed"]


def test_the_cpu_runs_kernels_in_the_interpreter_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not autotune.kernels_run_on(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert autotune.kernels_run_on(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_algorithm_of_the_layers_agrees_with_its_reference(dtype, visible, monkeypatch, caplog):
    """What is measured on a GPU, in Triton's interpreter, whose products of bfloat16 are wrong: none is left out."""
    choices = Choices(lambda work: (work(), 1.0)[1])
    monkeypatch.setattr(autotune, "CHOICES", choices)
    monkeypatch.setattr(autotune, "is_open", lambda rows: True)
    with caplog.at_level(logging.WARNING):
        for _, layer, stride in layers():
            run_layer(layer, stride, visible[3:], None if dtype == torch.float32 else dtype)
    assert len(choices.measured) == 7 and not caplog.records
    assert {times for each in choices.measured.values() for times in each.values()} == {1.0}
    assert all(len(each) > 1 for each in choices.measured.values())


@pytest.mark.parametrize("name", ["3×3", "depthwise", "densify"])
def test_gradients_of_kernels_are_handed_on_in_float32(name, visible):
    """Sums that fp16 cannot hold arrive whole."""
    layer, stride = next(each[1:] for each in layers() if each[0] == name)
    with sparse.choose("implicit_gemm", "gather"):
        exact, half = (
            run_layer(layer, stride, visible[3:], dtype, upstream_scale=1e4) for dtype in (None, torch.float16)
        )
    ((ours, expected),) = [pair for pair in zip(half[2:], exact[2:]) if pair[0].dim() == 4 and len(pair[0]) > 1]
    assert expected.abs().max() > torch.finfo(torch.float16).max
    assert ((ours - expected).norm() / expected.norm()).item() < 2e-2


def layers(device="cpu", channels=6):
    """Name, layer, and the strides of its input."""
    yield "3×3", sparse.Conv2d(channels, 5, 3, 1, 1).to(device), 4
    yield "3×3 stride 2", sparse.Conv2d(channels, 5, 3, 2, 1, bias=False).to(device), 2
    yield "1×7", sparse.Conv2d(channels, 5, (1, 7), 1, (0, 3), bias=False).to(device), 4
    yield "even", sparse.Conv2d(channels, 5, 4, 2, 1, bias=False).to(device), 4
    yield "depthwise", sparse.Conv2d(channels, channels, 7, 1, 3, groups=channels).to(device), 8
    yield "depthwise 1×5", sparse.Conv2d(channels, channels, (1, 5), 1, (0, 2), 1, channels, False).to(device), 8
    yield "densify", Densify(channels, 5, 3).to(device), 8


def run_layer(layer, stride, visible, dtype=None, channels=6, patch=8, upstream_scale=1.0):
    device = visible.device
    pyramid = sparse.Pyramid(visible, patch, "native")
    shape = pyramid.neighbours.sites(stride), channels
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    x = sparse.SparseTensor(rows, coordinate_map_key=pyramid.key(stride), coordinate_manager=pyramid)
    layer.zero_grad()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        out = layer(x)
    out = out if isinstance(out, torch.Tensor) else out.F
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(device) * upstream_scale
    out.backward(upstream.to(out.dtype))
    # cloned: a module that moves to another device takes its gradients along
    return [out.detach(), rows.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
@pytest.mark.parametrize("algorithm", ["implicit_gemm", "gather", "tiles", "raster", "dense"])
def test_layers_give_the_same_in_every_algorithm(algorithm, visible):
    for name, layer, stride in layers():
        expected = run_layer(layer, stride, visible[3:])
        with sparse.choose(algorithm):
            actual = run_layer(layer, stride, visible[3:])
        for ours, theirs in zip(actual, expected):
            assert relative_error(ours, theirs) < 1e-4, name


def masks(images=16):
    visible = torch.rand(images, 7, 7, generator=torch.Generator().manual_seed(4)) < 0.4
    visible[:, 0, 0] = True
    return visible


@pytest.mark.gpu
def test_on_a_gpu_what_is_chosen_gives_the_cpus_results(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name, layer, stride in layers(channels=48):
        expected = run_layer(layer, stride, masks(), channels=48, patch=32)
        actual = run_layer(layer.cuda(), stride, masks().cuda(), channels=48, patch=32)
        for ours, theirs in zip(actual, expected):
            assert relative_error(ours.cpu(), theirs) < 1e-4, name
    measured = {key: times for key, times in sparse.measured_choices().items() if key.shapes[0][1] == 48}
    assert {operation.name for operation in measured} == {
        "convolution",
        "convolution to dense",
        "depthwise convolution",
    }
    assert all(math.isfinite(each) for times in measured.values() for each in times.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_autocast_is_near_float32(dtype):
    for name, layer, stride in layers("cuda", channels=64):
        with sparse.choose("tiles", "dense"):
            expected = run_layer(layer, stride, masks().cuda(), channels=64, patch=32)
        actual = run_layer(layer, stride, masks().cuda(), dtype, channels=64, patch=32)
        for ours, theirs in zip(actual, expected):
            assert ((ours.float() - theirs).norm() / theirs.norm()).item() < 5e-2, name
