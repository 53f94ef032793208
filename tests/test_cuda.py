"""The exactness contract on a GPU: whole models against the simulation on the CPU in float64."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import TOLERANCE, contract_masks, names_in_simulation, randomise, relative_error
from tiny_runs import write_config, write_images
from torch import Tensor

import spark_me
from spark_me import cli
from spark_me.bench.workloads import MaskedDenseSparK
from spark_me.devices import float32_products
from spark_me.networks import dense_network
from spark_me.spark import SparK
from spark_me.trace import trace
from spark_me.train.logs import read_metrics

ENCODERS = ["resnet18", "resnet50", "convnextv2_atto"]
WELL_CONDITIONED = ["resnet18", "convnextv2_atto"]
"""Of a random ResNet-50 on so few sites, rounding alone changes some gradients by a fifth, on any device."""
ROUNDING = 8
"""How many times the simulation's own float32 error a tensor may be off: deep in a network 1e-4 is too strict."""

pytestmark = pytest.mark.gpu


class Pass(NamedTuple):
    """What a pass computes, named and shaped as in the simulation, in float64 on the CPU."""

    loss: Tensor
    features: list[Tensor]
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]


def case() -> tuple[Tensor, Tensor]:
    visible = contract_masks()
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(visible), 3, 96, 128, dtype=torch.float64, generator=generator), visible


def build(name: str, backend: str = "native") -> tuple[SparK, MaskedDenseSparK]:
    """A model and the simulation of it, in float64 on the CPU."""
    model = spark_me.build_model(name, image_size=(96, 128), decoder_width=32, drop_path=0.0, backend=backend)
    randomise(model).double()
    oracle = MaskedDenseSparK(trace(dense_network(name)), decoder_width=32).double()
    oracle.load_state_dict({**oracle.state_dict(), **names_in_simulation(model.state_dict())})
    return model, oracle


def run_simulation(oracle: MaskedDenseSparK, dtype: torch.dtype = torch.float64) -> Pass:
    images, visible = case()
    oracle.to(dtype)
    images = images.to(dtype).requires_grad_()
    loss = oracle(images, visible)
    loss.backward()
    statistics = host(statistics_of(oracle))
    with torch.no_grad():
        features = oracle.encoder(images, visible)
    gradients = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}  # no classifier's
    gradients |= {"images": images.grad}
    return Pass(loss.detach().double(), [x.double() for x in features], host(gradients), statistics)


def run_ours(
    model: SparK,
    oracle: MaskedDenseSparK,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    mask_device: str = "cpu",
    device: str = "cuda",
) -> Pass:
    images, visible = case()
    model.to(device, dtype)
    images, visible = images.to(device, dtype).requires_grad_(), visible.to(mask_device)
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(images, visible)
    loss.backward()
    statistics = names_in_simulation(host(statistics_of(model)))
    with torch.no_grad(), torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        features = [x.double().cpu() for x in model.encode(images, visible)]
    gradients = names_in_simulation(host({name: p.grad for name, p in model.named_parameters()}))
    gradients |= host({"images": images.grad})
    return Pass(loss.detach().double().cpu(), features, gradients, statistics)


def statistics_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in module.named_buffers() if not name.endswith("num_batches_tracked")}


def host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().cpu().clone() for name, x in tensors.items()}


def errors(actual: Pass, expected: Pass) -> Iterator[tuple[str, float]]:
    """Names and relative errors; gradients are called so."""
    yield "loss", relative_error(actual.loss, expected.loss)
    for number, pair in enumerate(zip(actual.features, expected.features, strict=True)):
        yield f"features {number}", relative_error(*pair)
    for name, statistic in expected.statistics.items():
        yield f"statistic {name}", relative_error(actual.statistics[name], statistic)
    for name, gradient in expected.gradients.items():
        yield f"gradient {name}", relative_error(actual.gradients[name], gradient)


@contextmanager
def reproducible() -> Iterator[None]:
    """cuDNN may choose kernels of the dense decoder that add in any order."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before


@pytest.mark.parametrize("mask_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ENCODERS)
def test_float64(name, mask_device, backend):
    model, oracle = build(name, backend)
    expected = run_simulation(oracle)
    for what, error in errors(run_ours(model, oracle, torch.float64, mask_device=mask_device), expected):
        assert error < TOLERANCE[torch.float64], f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("name", ENCODERS)
def test_float32(name, backend):
    model, oracle = build(name, backend)
    expected = run_simulation(oracle)
    rounding = dict(errors(run_simulation(build(name)[1], torch.float32), expected))
    with float32_products(tf32=False):
        actual = run_ours(model, oracle, torch.float32)
    for what, error in errors(actual, expected):
        bound = max(TOLERANCE[torch.float32], ROUNDING * rounding[what])
        if name in WELL_CONDITIONED or not what.startswith("gradient"):
            assert error < bound, f"{what}: relative error {error:.2e}, at most {bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_autocast_is_near(name, dtype, backend):
    model, oracle = build(name, backend)
    expected = run_simulation(oracle)
    actual = run_ours(model, oracle, torch.float32, autocast=dtype)
    assert abs(actual.loss / expected.loss - 1) < 3e-2
    ours, theirs = (
        torch.cat([one.gradients[name].flatten() for name in expected.gradients]) for one in (actual, expected)
    )
    assert ours.isfinite().all()
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ENCODERS)
def test_two_runs_are_bitwise_equal(name, dtype):
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model = spark_me.build_model(name, image_size=(96, 128), decoder_width=32, drop_path=0.2).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        images, _ = case()
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(images.float().cuda())
            loss.backward()
            optimizer.step()
        return [loss.detach(), *(tensor.clone() for tensor in model.state_dict().values())]

    with reproducible():
        first, second = run(), run()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_reconstruction_and_nodata():
    """A patch without data is neither encoded nor in the loss, whichever device its mask is on."""
    model, _ = build("resnet18")
    images, visible = case()
    valid = torch.ones_like(visible)
    valid[0, 0, 0] = visible[0, 0, 0] = False
    expected = model.eval().reconstruct(images, visible, valid)
    model.cuda()
    for device in ("cpu", "cuda"):
        actual = model.reconstruct(images.cuda(), visible.to(device), valid.to(device))
        assert actual.visible.is_cuda and torch.equal(actual.visible.cpu(), visible)
        assert relative_error(actual.prediction.cpu(), expected.prediction) < 1e-9
        assert relative_error(actual.loss.cpu(), expected.loss) < 1e-9


@pytest.mark.parametrize(
    ("precision", "backend"), list(itertools.product(["fp32", "tf32", "bf16", "fp16"], ["native", "minkowski"]))
)
def test_a_run(precision: str, backend: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), epochs=1, batch_size=2, height=64)
    overrides = [f"run.dir={tmp_path / 'run'}", "run.device=cuda", f"train.precision={precision}"]
    assert cli.main(["pretrain", str(config), *overrides, f"model.backend={backend}"]) == 0
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in entry]
    assert len(losses) == 4 and losses == pytest.approx([1.0] * 4, abs=0.15)
