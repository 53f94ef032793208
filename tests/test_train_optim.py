"""Parameter groups of the real model, and that decay and LAMB do what they say."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spark_me import build_model, sparse
from spark_me.config_schema import OptimConfig
from spark_me.train.optim import build_optimizer, parameter_groups


def test_no_decay_on_norms_biases_and_mask_tokens() -> None:
    model = build_model("resnet18", image_size=(64, 64), decoder_width=32)
    decayed, free = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    free_names = {names[id(parameter)] for parameter in free["params"]}
    assert decayed_names | free_names == set(names.values())
    assert not decayed_names & free_names
    assert all(name.endswith(("weight", "kernel")) for name in decayed_names)
    assert {name for name in free_names if "mask_token" in name} == {f"densify.{i}.mask_token" for i in range(4)}
    # Everything else that is free is a bias or a norm's.
    others = {name for name in free_names if not name.endswith("bias") and "mask_token" not in name}
    assert all("norm" in name or "bn" in name or "downsample.1" in name for name in others)
    assert "encoder.conv1.kernel" in decayed_names


@pytest.mark.parametrize("encoder", ["convnext_tiny", "convnextv2_atto"])
def test_convnexts_decay_matrices_and_kernels_alone(encoder: str) -> None:
    model = build_model(encoder, image_size=(64, 64), decoder_width=32)
    decayed, free = parameter_groups(model)
    expected = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, sparse.Conv2d | sparse.DepthwiseConv2d | nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
        for name, parameter in module.named_parameters()
        if name in ("kernel", "weight")
    }
    assert {id(parameter) for parameter in decayed["params"]} == expected
    assert {id(parameter) for parameter in free["params"]} == {id(p) for p in model.parameters()} - expected


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_weight_decay_reaches_decayed_parameters_alone(name: str) -> None:
    layer = nn.Linear(3, 3)
    nn.init.ones_(layer.bias)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, OptimConfig(name=name))
    for group in optimizer.param_groups:
        group.update(lr=0.1, weight_decay=0.5 if group["decayed"] else 0.0)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (layer.weight.abs() < before.abs()).all()
    assert torch.equal(layer.bias, torch.ones(3))


def test_first_lamb_step_by_hand(assert_close: Callable[[Tensor, Tensor], None]) -> None:
    # Bias-corrected moments make the first update g / (|g| + eps) + decay · w, scaled to the norm of w.
    weight = torch.tensor([[3.0, -4.0]])
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(weight)
    optimizer = build_optimizer(layer, OptimConfig(name="lamb"))
    optimizer.param_groups[0].update(lr=0.1, weight_decay=0.2)
    layer.weight.grad = torch.tensor([[100.0, 50.0]])
    optimizer.step()
    update = torch.tensor([[1.0, 1.0]]) + 0.2 * weight
    assert_close(layer.weight.detach(), weight - 0.1 * update * (5.0 / update.norm()))
