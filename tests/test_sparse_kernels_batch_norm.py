"""Triton's batch normalisation against float64 arithmetic written out, and against torch's own module.

Without a GPU the kernels run in Triton's interpreter. With one they run on it, and tests marked `gpu` repeat what
a real device could break.
"""

import itertools

import pytest
import torch
from conftest import randomise, relative_error
from kernel_compilation import compile_in_new_process
from torch import distributed, multiprocessing, nn
from torch.autograd.graph import saved_tensors_hooks

from spark_me.sparse.kernels import batch_norm as fused
from spark_me.sparse.kernels.batch_norm import fused_batch_norm

pytestmark = pytest.mark.any_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FOLLOWED_BY = list(itertools.product([False, True], repeat=3))  # shortcut, scale, relu


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that every program of a reduction sees several tiles, the last of them incomplete."""
    monkeypatch.setattr(fused, "PROGRAMS", 3)


class Case:
    """Rows [N, C] with what may follow their norm, an upstream gradient, and the same in float64."""

    def __init__(self, rows, channels, shortcut=False, scale=False, dtype=torch.float32, mean=1.0, device=DEVICE):
        generator = torch.Generator().manual_seed(rows + channels)

        def draw(*shape):
            return torch.randn(shape, generator=generator)

        self.norm = randomise(nn.BatchNorm1d(channels)).to(device)
        self.rows = (draw(rows, channels) * 2 + mean).to(device, dtype).requires_grad_()
        self.shortcut = draw(rows, channels).to(device, dtype).requires_grad_() if shortcut else None
        self.scale = (torch.rand(rows, generator=generator) + 0.5).to(device, dtype) if scale else None
        if scale:
            self.scale[: rows // 3] = 0
        self.upstream = (draw(rows, channels) + 1).to(device, dtype)  # sums that do not cancel

    def run(self, relu):
        """Outputs, gradients and statistics of the kernels, by name."""
        out = fused_batch_norm(self.norm, self.rows, self.shortcut, self.scale, relu)
        out.backward(self.upstream.to(out.dtype))
        return (
            {"output": out}
            | self._gradients(self.rows, self.shortcut, self.norm.weight, self.norm.bias)
            | {
                "running mean": self.norm.running_mean,
                "running variance": self.norm.running_var,
            }
        )

    def expected(self, relu):
        """The same by float64 arithmetic, without any module of torch. To be asked for before `run`."""
        rows, weight, bias = (_double(x) for x in (self.rows, self.norm.weight, self.norm.bias))
        shortcut = None if self.shortcut is None else _double(self.shortcut)
        mean, variance = self.norm.running_mean.double(), self.norm.running_var.double()
        running = (mean, variance)
        if self.norm.training:
            batch_mean = rows.mean(dim=0)
            batch_variance = (rows - batch_mean).square().mean(dim=0)
            unbiased = batch_variance * len(rows) / (len(rows) - 1)
            running = (0.9 * mean + 0.1 * batch_mean, 0.9 * variance + 0.1 * unbiased)
            mean, variance = batch_mean, batch_variance
        out = (rows - mean) / (variance + self.norm.eps).sqrt() * weight + bias
        if self.scale is not None:
            out = out * self.scale.double()[:, None]
        if shortcut is not None:
            out = out + shortcut
        if relu:
            out = out * (out > 0)
        out.backward(self.upstream.double())
        gradients = self._gradients(rows, shortcut, weight, bias)
        return {"output": out} | gradients | {"running mean": running[0], "running variance": running[1]}

    @staticmethod
    def _gradients(rows, shortcut, weight, bias):
        named = {"rows": rows, "shortcut": shortcut, "weight": weight, "bias": bias}
        return {f"gradient of {name}": x.grad for name, x in named.items() if x is not None}


def _double(x):
    return x.detach().double().requires_grad_()


def hide_edge_of_relu(actual, expected):
    """By rounding, a site at the edge may fall to the other side: its gradients are not compared."""
    edge = expected["output"].abs() < 1e-2
    for results in (actual, expected):
        for name in {"gradient of rows", "gradient of shortcut"} & results.keys():
            results[name] = results[name].masked_fill(edge, 0)


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert relative_error(actual[name].double(), wanted.double()) < tolerance, name


@pytest.mark.parametrize(
    "rows, channels, shortcut, scale, relu",
    [(1300, 5, *followed_by) for followed_by in FOLLOWED_BY]
    + [(*shape, *followed_by) for shape in ((4100, 1), (77, 64), (130, 100)) for followed_by in FOLLOWED_BY[1::6]],
)
def test_outputs_gradients_and_statistics_equal_float64(rows, channels, shortcut, scale, relu):
    case = Case(rows, channels, shortcut, scale)
    expected = case.expected(relu)
    assert_same(case.run(relu), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("shortcut, scale, relu", [(False, False, True), (True, True, True), (True, False, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_statistics_in_float32(dtype, shortcut, scale, relu):
    case = Case(200, 9, shortcut, scale, dtype)
    expected, actual = case.expected(relu), case.run(relu)
    hide_edge_of_relu(actual, expected)
    assert_same(actual, expected, TOLERANCE[dtype])
    assert actual["output"].dtype == actual["gradient of rows"].dtype == dtype
    for name in ("running mean", "running variance"):
        assert relative_error(actual[name].double(), expected[name]) < 1e-5


def test_a_mean_far_above_the_deviation_does_not_cancel():
    case = Case(1000, 3, mean=3000.0)
    expected, actual = case.expected(False), case.run(False)
    for name in ("output", "gradient of rows", "running mean", "running variance"):
        assert relative_error(actual[name].double(), expected[name]) < 1e-4, name


@pytest.mark.parametrize("shortcut, scale, relu", FOLLOWED_BY)
def test_eval_mode_takes_the_running_statistics(shortcut, scale, relu):
    case = Case(70, 5, shortcut, scale)
    case.norm.eval()
    expected = case.expected(relu)
    assert_same(case.run(relu), expected, TOLERANCE[torch.float32])
    assert case.norm.num_batches_tracked == 0


SETTINGS = [{}, {"momentum": None}, {"momentum": 0.0}, {"momentum": 0.3, "eps": 1e-2}]
SETTINGS += [{"affine": False}, {"track_running_stats": False}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_are_those_of_torchs_module(settings):
    """Three batches in training, one in eval mode: outputs, statistics and the count of batches."""
    ours, theirs = (nn.BatchNorm1d(4, **settings).to(DEVICE) for _ in range(2))
    for mode in (True, True, True, False):
        rows = (torch.randn(50, 4) * 3 + 1).to(DEVICE)
        out = fused_batch_norm(ours.train(mode), rows, None, None, False)
        assert relative_error(out, theirs.train(mode)(rows)) < 1e-5
    for (name, actual), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert relative_error(actual.double(), expected.double()) < 1e-5, name
    if ours.running_mean is not None:
        assert ours.num_batches_tracked == 3


def test_a_single_row_is_normalised_by_the_running_statistics():
    norm = randomise(nn.BatchNorm1d(4)).to(DEVICE)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    rows = (torch.randn(1, 4) * 3 + 1).to(DEVICE)
    out = fused_batch_norm(norm.train(), rows, None, None, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    assert relative_error(out, norm.eval()(rows)) < 1e-5
    with pytest.raises(ValueError, match=r"more than one site to train, not features \[1, 4\]"):
        fused_batch_norm(nn.BatchNorm1d(4, track_running_stats=False).to(DEVICE), rows, None, None, False)


def test_nan_is_not_hidden_by_relu():
    case = Case(40, 4)
    with torch.no_grad():
        case.rows[7, 2] = torch.nan
    out = case.run(True)["output"]
    assert out[:, 2].isnan().all() and out[:, [0, 1, 3]].isfinite().all()


def test_strided_tensors_and_an_expanded_gradient():
    case = Case(60, 6, shortcut=True)
    case.upstream = torch.ones(1, device=DEVICE).expand(60, 6)
    expected = case.expected(True)
    case.rows, case.shortcut = (x.detach().T.contiguous().T.requires_grad_() for x in (case.rows, case.shortcut))
    assert_same(case.run(True), expected, TOLERANCE[torch.float32])


def test_a_sum_of_two_dtypes_has_the_wider():
    case = Case(60, 6, shortcut=True, dtype=torch.bfloat16)
    case.shortcut = case.shortcut.detach().float().requires_grad_()
    expected, actual = case.expected(False), case.run(False)
    assert actual["output"].dtype == case.shortcut.grad.dtype == torch.float32
    assert case.rows.grad.dtype == torch.bfloat16
    assert_same(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    "shortcut, relu, wide", [(False, False, 1), (False, True, 1), (True, False, 1), (True, True, 2)]
)
def test_the_rows_are_kept_and_the_output_where_it_is_needed(shortcut, relu, wide):
    case = Case(60, 6, shortcut)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fused_batch_norm(case.norm, case.rows, case.shortcut, None, relu)
    assert sum(x.dim() == 2 for x in kept) == wide


SHARES = {2: [1299, 1], 4: [700, 1, 599, 500]}
"""By number of processes: the rows of each."""
COLLECTIVES = ("all_gather_into_tensor", "all_reduce")


def run_share(rank, shares, mean, relu, folder):
    """One process's part of a `Case`; its results and the collectives that they took go into a file."""
    torch.set_num_threads(1)  # OpenMP's threads are not in a fork
    store = distributed.FileStore(f"{folder}/store", len(shares))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(shares))
    calls = []
    for name in COLLECTIVES:
        collective = getattr(distributed, name)
        setattr(distributed, name, lambda *of, name=name, call=collective: calls.append(name) or call(*of))
    case = Case(sum(shares), 5, shortcut=True, scale=True, mean=mean)
    rows, shortcut, scale, upstream = (
        x.detach().split(shares)[rank] for x in (case.rows, case.shortcut, case.scale, case.upstream)
    )
    rows.requires_grad_()
    out = fused_batch_norm(case.norm, rows, shortcut.requires_grad_(), scale, relu, synchronise=True)
    out.backward(upstream)
    gradients = Case._gradients(rows, shortcut, case.norm.weight, case.norm.bias)
    statistics = (case.norm.running_mean, case.norm.running_var, case.norm.num_batches_tracked)
    torch.save((out.detach(), gradients, statistics, calls), f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="processes on the CPU run the kernels in Triton's interpreter")
@pytest.mark.parametrize("processes", SHARES)
@pytest.mark.parametrize("mean, relu", [(1.0, True), (3000.0, False)])
def test_synchronised_processes_equal_one_and_float64(processes, mean, relu, tmp_path):
    shares = SHARES[processes]
    arguments = (shares, mean, relu, str(tmp_path))
    multiprocessing.start_processes(run_share, arguments, nprocs=processes, start_method="fork")
    outputs, gradients, statistics, calls = zip(*(torch.load(tmp_path / str(rank)) for rank in range(processes)))
    case = Case(sum(shares), 5, shortcut=True, scale=True, mean=mean)
    exact, alone = case.expected(relu), case.run(relu)
    actual = {
        "output": torch.cat(outputs),
        "gradient of rows": torch.cat([each["gradient of rows"] for each in gradients]),
        "gradient of shortcut": torch.cat([each["gradient of shortcut"] for each in gradients]),
        "gradient of weight": sum(each["gradient of weight"] for each in gradients),
        "gradient of bias": sum(each["gradient of bias"] for each in gradients),
        "running mean": statistics[0][0],
        "running variance": statistics[0][1],
    }
    if mean > 1:  # float32 holds the rows themselves to 1e-4, and their products add that up
        del actual["gradient of weight"], exact["gradient of weight"], alone["gradient of weight"]
    for expected in (exact, alone):
        hide_edge_of_relu(actual, expected)
        assert_same(actual, expected, TOLERANCE[torch.float32] * (1 if mean == 1 else 10))
    for of_process in statistics:  # the same bits on all, as nothing brings them together later
        assert all(torch.equal(one, other) for one, other in zip(of_process, statistics[0], strict=True))
        assert of_process[2] == 1
    assert calls == (["all_gather_into_tensor", "all_reduce"],) * processes  # one forward, one backward


COMPILATION = """
import torch
from torch import nn
from kernel_compilation import compiled_kernels
from torch import distributed
from spark_me.sparse.kernels.batch_norm import _moments_of_processes, fused_batch_norm

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
with compiled_kernels() as kernels:
    for channels in (64, 1):
        rows = torch.randn(100, channels).bfloat16().requires_grad_()
        for followed_by in ((None, None, True), (rows, torch.ones(100), True)):
            fused_batch_norm(nn.BatchNorm1d(channels), rows, *followed_by).sum().backward()
    _moments_of_processes(torch.ones(3, 3, 64))
print(*sorted({kernel.metadata.name for kernel in kernels}))
"""


def test_the_kernels_compile_for_a_gpu():
    names = ["combine_moments", "gradient_sums_of_parts", "input_gradient", "moments_of_parts", "normalise"]
    names += ["statistics"]
    assert compile_in_new_process(COMPILATION) == names


@pytest.mark.gpu
@pytest.mark.parametrize("shortcut, scale, relu", [(False, False, True), (True, True, True), (True, False, False)])
@pytest.mark.parametrize(
    "rows, channels, dtype",
    [(300_001, 256, torch.bfloat16), (1_300_000, 64, torch.float16), (20_000, 2048, torch.bfloat16)]
    + [(300_001, 256, torch.float32), (50_000, 100, torch.float32)],
)
def test_realistic_sizes_on_a_gpu(rows, channels, dtype, shortcut, scale, relu, monkeypatch):
    monkeypatch.undo()  # all programs
    case = Case(rows, channels, shortcut, scale, dtype, device="cuda")
    expected, actual = case.expected(relu), case.run(relu)
    hide_edge_of_relu(actual, expected)
    assert_same(actual, expected, max(2 * TOLERANCE[dtype], 1e-4))  # sums of many rows


@pytest.mark.gpu
def test_results_are_reproducible_bitwise_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    first, second = (Case(300_001, 256, True, True, torch.bfloat16, device="cuda").run(True) for _ in range(2))
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name
