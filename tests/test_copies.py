"""Copies of models and of every layer: deep, pickled, saved whole and averaged, on both backends."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import contract_masks, randomise
from tiny_runs import RESNET
from torch import nn
from torch.nn import functional
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
    "Conv2d": lambda: sparse.Conv2d(4, 6, 3, 2, 1, groups=2),
    "depthwise Conv2d": lambda: sparse.Conv2d(4, 4, (1, 3), 1, (0, 1), groups=4),
    "MaxPool2d": lambda: sparse.MaxPool2d(3, 2, 1),
    "AvgPool2d": lambda: sparse.AvgPool2d(2, 2),
    "BatchNorm2d": lambda: sparse.BatchNorm2d(4),
    "LayerNorm": lambda: sparse.LayerNorm(4),
    "GlobalResponseNorm": lambda: sparse.GlobalResponseNorm(4),
    "GroupNorm": lambda: sparse.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: sparse.InstanceNorm2d(4),
    "DropPath": lambda: sparse.DropPath(0.5).eval(),
}


class Functions(nn.Module):
    """Operations of every kind that a trace keeps: functions, methods, operators, parameters, indices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("shift", torch.ones(1, 8, 1, 1))
        self.conv = nn.Conv2d(16, 8, 3, 2, 1)
        self.squeeze, self.last = nn.Linear(8, 8), nn.Conv2d(8, 4, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        one, other = (functional.gelu(x) * self.gamma - self.shift).chunk(2, dim=1)
        x = torch.cat([one.sigmoid(), other, x.clamp(-1, 1) / 2], 1)
        images, channels, height, width = x.shape
        x = x.view(images, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)
        x = self.conv(x)
        x = x * self.squeeze(x.mean((2, 3)))[:, :, None, None].sigmoid()
        return self.last(functional.max_pool2d(x[:, ::1], 3, 1, 1))


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


ENCODERS = [
    (RESNET, "native"),
    (RESNET, "minkowski"),
    ("timm/test_convnext3", "native"),
    ("functions", "native"),
    ("functions", "minkowski"),
]


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("encoder, backend", ENCODERS)
def test_model_computes_the_same_as_its_copy(encoder: str, make_copy: Copy, backend: str, one_thread: None) -> None:
    network, size = (Functions(), 16) if encoder == "functions" else (encoder, 64)
    model = spark_me.build_model(network, image_size=size, decoder_width=32, backend=backend)
    randomise(model)
    copied = make_copy(model)
    images = torch.randn(2, 3, size, size)
    visible = torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])
    model.eval(), copied.eval()
    assert torch.equal(model(images, visible), copied(images, visible))
    copied(images, visible).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in copied.parameters())


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copied_encoder_has_one_set_of_parameters(make_copy: Copy) -> None:
    """What its steps use is what its state dict names, and it shares nothing with the network that it was made of."""
    network = Functions()
    encoder = spark_me.sparsify(network)
    assert all(one is other for one, other in zip(encoder.parameters(), network.parameters(), strict=True))
    copied = make_copy(encoder)
    assert list(copied.state_dict()) == list(encoder.state_dict()) == list(network.state_dict())
    own = {parameter.data_ptr() for parameter in encoder.parameters()}
    assert not own & {parameter.data_ptr() for parameter in copied.parameters()}
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    x = sparse.to_sparse(torch.randn(6, 3, 24, 32), sparse.Pyramid(contract_masks(), 8, "native"))
    assert not any(out.F.any() for out in copied(x)[-1:])
    assert encoder(x)[-1].F.any()
