"""What several test modules need: masks that cover the exactness contract, random norms, relative errors."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spark_me.sparse import BACKENDS

if not torch.cuda.is_available():
    # Read when a kernel is defined: without a GPU, Triton's interpreter runs our kernels on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


LONGEST = (
    "terminal", "encoder", "spark", "bench", "bench_cuda", "outside_text", "weights_convnext_sparse", "readme",
    "recipes", "downstream_finetune", "train_torchrun", "train_pretrain",
)  # fmt: skip
"""Modules whose files go first, in this order: a process that begins one last would end long after the others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(LONGEST)))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def contract_masks() -> Tensor:
    """bool [6, 3, 4]: H ≠ W; all visible, one patch, a corner, a border, isolated patches, a random subset."""
    masks = torch.zeros(6, 3, 4, dtype=torch.bool)
    masks[0] = True
    masks[1, 1, 2] = True
    masks[2, 2, 3] = True
    masks[3, :, 0] = True
    masks[4, 0, 0] = masks[4, 0, 2] = masks[4, 2, 1] = masks[4, 2, 3] = True
    masks[5] = torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    return masks


def dense_input(dtype: torch.dtype, channels: int = 5, side: int = 8) -> Tensor:
    """Noise [6, C, 3·side, 4·side] for `contract_masks`."""
    noise = torch.randn(
        6, channels, 3 * side, 4 * side, dtype=torch.float64, generator=torch.Generator().manual_seed(11)
    )
    return noise.to(dtype)


def mask_at(visible: Tensor, height: int) -> Tensor:
    """`visible` [B, fh, fw] on maps of a height: [B, 1, h, w]."""
    side = height // visible.shape[1]
    return visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they save on maps of a few pixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no pictures: matplotlib takes longer than steps of tiny networks."""
    monkeypatch.setattr("spark_me.train.trainer.Trainer._draw", lambda self: None)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks of one block a stage, of their full width: the blocks of a stage are alike."""
    from timm.models import ConvNeXt, dpn, resnet, resnetv2
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig

    from spark_me.weights.expected import architecture_of

    kinds = {models.ResNet: "layers", models.ConvNeXt: "block_setting", models.DenseNet: "block_config"}
    kinds |= {resnet.ResNet: "layers", resnetv2.ResNetV2: "layers", ConvNeXt: "depths", dpn.DPN: "k_sec"}
    for kind, name in kinds.items():

        def start(self: nn.Module, *args: Any, full: Any = kind.__init__, name: str = name, **kwargs: Any) -> None:
            call = inspect.signature(full).bind(self, *args, **kwargs)
            stages = call.arguments[name]
            call.arguments[name] = [
                1 if isinstance(one, int) else CNBlockConfig(one.input_channels, one.out_channels, 1) for one in stages
            ]
            full(*call.args, **call.kwargs)

        monkeypatch.setattr(kind, "__init__", start)
    architecture_of.cache_clear()
    yield
    architecture_of.cache_clear()


@pytest.fixture
def visible() -> Tensor:
    return contract_masks()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases and norm statistics: defaults of one and zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * (2 / parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(noise * 0.2 + (1 if name.endswith("weight") else 0))
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module


def names_in_simulation(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named as in a `SparK` model (weights, gradients, statistics), as the simulation of it names them."""
    prefix = "encoder."
    return {
        f"{prefix}network.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: tensor
        for key, tensor in tensors.items()
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """Agreement within the exactness contract's tolerance for the dtype."""

    def check(actual: Tensor, expected: Tensor, what: str = "") -> None:
        error = relative_error(actual, expected)
        assert error < TOLERANCE[expected.dtype], f"{what}: relative error {error:.2e}"

    return check
