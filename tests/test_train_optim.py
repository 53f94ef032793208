"""Parameter groups of the real model, and that decay and LAMB do what they say."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spark_me import build_model
from spark_me.config.training import LambConfig, OptimConfig
from spark_me.train.schedules import build_optimizer, parameter_groups


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
    assert "encoder.conv1.weight" in decayed_names


@pytest.mark.parametrize("encoder", ["convnext_tiny", "convnextv2_atto"])
def test_convnexts_decay_matrices_and_kernels_alone(encoder: str) -> None:
    model = build_model(encoder, image_size=(64, 64), decoder_width=32)
    decayed, free = parameter_groups(model)
    expected = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
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


@pytest.mark.parametrize(
    ("clip_norm", "options"),
    [
        (5.0, LambConfig()),  # the paper's own pretraining
        (5.0, LambConfig(max_grad_norm=1.0)),  # mmpretrain's
        (None, LambConfig(max_grad_norm=1.0)),  # mmpretrain's fine-tuning
        (None, LambConfig(max_grad_norm=1e7, bias_correction=False, always_adapt=True)),  # the paper's own
    ],
)
def test_five_steps_equal_lamb_as_published(clip_norm: float | None, options: LambConfig) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, dtype=torch.float64)
    gradients = [{key: torch.randn_like(tensor) for key, tensor in layer.named_parameters()} for _ in range(5)]
    for gradient, norm in zip(gradients, (3, 40, 0.5, 12, 25), strict=True):
        length = sum(float(tensor.square().sum()) for tensor in gradient.values()) ** 0.5
        gradient |= {key: tensor * (norm / length) for key, tensor in gradient.items()}
    expected = lamb_by_the_paper(dict(layer.named_parameters()), gradients, clip_norm, options)
    optimizer = build_optimizer(layer, OptimConfig(name="lamb", betas=[0.9, 0.95], lamb=options))
    for group in optimizer.param_groups:
        group.update(lr=0.1, weight_decay=0.2 if group["decayed"] else 0.0)
    for gradient in gradients:
        for key, parameter in layer.named_parameters():
            parameter.grad = gradient[key].clone()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(layer.parameters(), clip_norm)
        optimizer.step()
    for key, parameter in layer.named_parameters():
        assert (parameter - expected[key]).abs().max() < 1e-12 * expected[key].abs().max(), key


def lamb_by_the_paper(
    weights: dict[str, Tensor], gradients: list[dict[str, Tensor]], clip_norm: float | None, options: LambConfig
) -> dict[str, Tensor]:
    """Algorithm 2 of arXiv 1904.00962, with what the published implementations make of it; lr 0.1, decay 0.2."""
    weights = {key: tensor.detach().clone() for key, tensor in weights.items()}
    first = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    second = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    for step, gradient in enumerate(gradients, 1):
        for largest, added in ((clip_norm, 1e-6), (options.max_grad_norm, 0)):  # torch's clipping adds to the norm
            norm = torch.cat([tensor.flatten() for tensor in gradient.values()]).norm() + added
            if largest is not None and norm > largest:
                gradient = {key: tensor * (largest / norm) for key, tensor in gradient.items()}
        for key, weight in weights.items():
            first[key] = 0.9 * first[key] + 0.1 * gradient[key]
            second[key] = 0.95 * second[key] + 0.05 * gradient[key] ** 2
            corrections = (1 - 0.9**step, 1 - 0.95**step) if options.bias_correction else (1, 1)
            update = (first[key] / corrections[0]) / ((second[key] / corrections[1]).sqrt() + 1e-6)
            decay = 0.2 if key == "weight" else 0.0
            update = update + decay * weight
            if decay or options.always_adapt:
                update = update * (weight.norm() / update.norm())
            weights[key] = weight - 0.1 * update
    return weights
