"""Copies of models and of every layer: deep, pickled, saved whole and averaged, on both backends."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import contract_masks, randomise
from torch import nn
from torch.optim.swa_utils import AveragedModel

import spark_me
from spark_me import sparse

Copy = Callable[[nn.Module], nn.Module]


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Copy] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
    "AveragedModel": lambda module: AveragedModel(module).module,
}

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Conv2d": lambda: sparse.Conv2d(4, 6, 3, stride=2, groups=2, bias=True),
    "DepthwiseConv2d": lambda: sparse.DepthwiseConv2d(4, 3),
    "MaxPool2d": lambda: sparse.MaxPool2d(3, 2),
    "AvgPool2d": lambda: sparse.AvgPool2d(2, 2),
    "BatchNorm": lambda: sparse.BatchNorm(4),
    "LayerNorm": lambda: sparse.LayerNorm(4),
    "GlobalResponseNorm": lambda: sparse.GlobalResponseNorm(4),
    "GroupNorm": lambda: sparse.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: sparse.InstanceNorm2d(4),
    "SqueezeExcite": lambda: sparse.SqueezeExcite(4, 2),
    "Linear": lambda: sparse.Linear(4, 3),
    "GELU": sparse.GELU,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layer_computes_the_same_as_its_copy(layer: Callable[[], nn.Module], make_copy: Copy, backend: str) -> None:
    original = randomise(layer().double())
    copied = make_copy(original)
    images = torch.randn(6, 4, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = [
        sparse.to_dense(module(sparse.to_sparse(images, sparse.Pyramid(contract_masks(), 8, backend))))
        for module in (original, copied)
    ]
    assert torch.equal(*outputs)
    for one, other in zip(original.parameters(), copied.parameters(), strict=True):
        assert one is not other and torch.equal(one, other)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("encoder", ["resnet18", "convnextv2_atto"])
def test_model_computes_the_same_as_its_copy(encoder: str, make_copy: Copy, backend: str, one_thread: None) -> None:
    model = spark_me.build_model(encoder, image_size=64, decoder_width=32, backend=backend)
    randomise(model)
    copied = make_copy(model)
    images = torch.randn(2, 3, 64, 64)
    visible = torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])
    model.eval(), copied.eval()
    assert torch.equal(model(images, visible), copied(images, visible))
    copied(images, visible).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
