"""Precisions: fp16's scaler skips and stops, tf32 asks for a GPU, a compiled decoder computes the same."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny_runs import SMALL, content_of, newest, take_step, write_config, write_images
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spark_me import build_model, cli
from spark_me.config.tasks import PretrainConfig
from spark_me.data.datasets import Batch
from spark_me.errors import UserError
from spark_me.train.checkpoint import TrainState, restore
from spark_me.train.distributed import Precision, device_of_process
from spark_me.train.logs import read_metrics
from spark_me.train.schedules import build_optimizer, build_schedule
from spark_me.train.step import Inputs, Stepper

CPU = torch.device("cpu")


class Fit:
    """A task of one weight [1, 1]: (w · 2)² for each image."""

    steps_per_epoch = 10

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, 0.5)

    def image_names(self, indices: Sequence[int]) -> list[str]:
        return [f"{index}.png" for index in indices]

    def inputs(self, batch: Batch) -> Inputs:
        return Inputs((batch.images,), len(batch.indices))

    def loss(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        return model(tensors[0]).float().square().mean()

    def after_step(self) -> None:
        """Nothing else changes."""


def fp16_stepper(scale: float) -> Stepper:
    task, config, precision = Fit(), PretrainConfig(), Precision("fp16", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = build_optimizer(task.model, config.optim)
    state = TrainState(task.model, optimizer, precision.scaler)
    return Stepper(task, state, build_schedule(config.optim, config.train, 10), precision, seed=0, clip_norm=5.0)  # type: ignore[arg-type]


def batch(value: float = 2.0) -> list[Batch]:
    return [Batch(torch.full((3, 1), value), [0, 1, 2], [])]


def test_overflowing_gradient_skips_the_step_and_lowers_the_scale() -> None:
    stepper = fp16_stepper(2.0**40)
    before = stepper.task.model.weight.detach().clone()
    values = take_step(stepper, batch())
    assert values["loss"] == pytest.approx(1.0)
    assert not math.isfinite(values["gradient_norm"])
    assert torch.equal(stepper.task.model.weight, before)
    assert (stepper.state.step, stepper.state.scaler.get_scale()) == (1, 2.0**39)
    stepper = fp16_stepper(2.0**4)
    assert take_step(stepper, batch())["gradient_norm"] == pytest.approx(4.0, rel=1e-3)  # d (2w)² / dw
    assert not torch.equal(stepper.task.model.weight, before)


def test_scale_that_underflows_stops() -> None:
    stepper = fp16_stepper(1e-5)
    # √x at 0 is finite with an infinite slope.
    stepper.task.loss = lambda model, images: (model(images) - model(images).detach()).sum().sqrt()  # type: ignore
    with pytest.raises(UserError, match="the gradient is .* at step 1"):
        take_step(stepper, batch())


def test_no_scale_mends_a_loss_that_is_not_finite() -> None:
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        take_step(fp16_stepper(1.0), batch(math.nan))


def test_scale_comes_back() -> None:
    stepper, other = fp16_stepper(2.0**40), fp16_stepper(2.0)
    take_step(stepper, batch())
    content = content_of(
        stepper.state,
        PretrainConfig(),
        task="pretrain",
        steps_per_epoch=10,
        data_fingerprint="",
    )
    restore(other.state, content, Path("step"))
    assert other.state.scaler.get_scale() == 2.0**39


def test_a_run_in_fp16(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL, epochs=1)
    assert cli.main(["pretrain", str(config), f"run.dir={tmp_path / 'run'}", "train.precision=fp16"]) == 0
    assert newest(tmp_path / "run")["scaler"]["scale"] >= 1
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in entry]
    assert losses == pytest.approx([1.0] * 4, abs=0.1)


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="tf32 needs a CUDA GPU, not cpu"):
        Precision("tf32", CPU)
    assert device_of_process("cpu") == CPU


@pytest.mark.parametrize("has_products", [True, False])
def test_a_run_in_bf16_where_the_cpu_has_its_products_else_in_float32(
    has_products: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spark_me.train.distributed.cpu_multiplies_bfloat16", lambda: has_products)
    config = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL, epochs=1)
    weights = []
    for precision in ("bf16", "fp32"):
        assert (
            cli.main(["pretrain", str(config), f"run.dir={tmp_path / precision}", f"train.precision={precision}"]) == 0
        )
        weights.append(newest(tmp_path / precision)["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) != has_products
    said = capsys.readouterr().out.count(
        "this CPU has no products of bfloat16 (AVX-512 or AMX): it computes in float32"
    )
    assert said == (not has_products)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_is_made_the_current_one_by_its_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    with FakeTensorMode():  # knows CUDA tensors without a GPU
        assert device_of_process(name) == torch.device("cuda", 0)
    assert current == [0]


# Inductor takes a minute to generate code; without it, the same graphs are traced.
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_decoder_gives_the_same_loss_and_gradient(
    one_thread: None, compiler: str, assert_close: Callable[[Tensor, Tensor], None]
) -> None:
    torch.manual_seed(0)
    model = build_model(SMALL, image_size=(16, 16), decoder_width=32).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    visible = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    results = []
    for compiled in (False, True):
        if compiled:
            names = list(model.state_dict())
            model.decoder.compile(dynamic=False, backend=compiler)
            assert list(model.state_dict()) == names
        model.zero_grad()
        loss = model(images, visible)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for actual, expected in zip(*results):
        assert_close(actual, expected)
