"""The layers that are checked, and what they must compute: dense operations of plain torch on masked maps.

The references are written out here, apart from the rest of spark_me: the input is masked, the dense operation runs, its
output is masked at the output's resolution.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from spark_me import sparse


@dataclass(frozen=True)
class Masks:
    """1 at active sites, else 0: at the resolution of the input and of the output, [B, 1, h, w] each."""

    before: Tensor
    after: Tensor


Dense = Callable[[Mapping[str, Tensor], Tensor, Masks], dict[str, Tensor]]


@dataclass(frozen=True)
class Layer:
    """A layer and its reference.

    Attributes:
        name: how messages call it.
        make: the sparse layer for (Cin, Cout) channels; layers that keep the number of channels ignore Cout.
        dense: from the layer's parameters by name, dense maps and masks to the "output", and to buffers by their name.
        stride: steps of the output.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    dense: Dense
    stride: int = 1


def layers() -> tuple[Layer, ...]:
    """Every layer whose kernels the engine, or a backend of ours in its place, computes."""
    return (
        _convolution(1),
        _convolution(3),
        _convolution(7, stride=2),
        _convolution(3, stride=2),
        _convolution(1, stride=2),
        _convolution(2, stride=2),
        _convolution(4, stride=4),
        _convolution(3, groups=2),
        _convolution(3, dilation=2),
        Layer(
            "depthwise 7×7",
            lambda channels, _: sparse.Conv2d(channels, channels, 7, padding=3, groups=channels),
            _dense_depthwise,
        ),
        _pool("max-pool", 3, lambda: sparse.MaxPool2d(3, 2, 1), _dense_max_pool),
        _pool("average pool", 3, lambda: sparse.AvgPool2d(3, 2, 1, count_include_pad=False), _dense_average_pool),
        _pool("average pool", 2, lambda: sparse.AvgPool2d(2, 2), _dense_average_pool),
        Layer("batch norm", lambda channels, _: sparse.BatchNorm2d(channels), _dense_batch_norm),
        Layer("layer norm", lambda channels, _: sparse.LayerNorm(channels, eps=1e-6), _dense_layer_norm),
        Layer("response norm", lambda channels, _: sparse.GlobalResponseNorm(channels), _dense_response_norm),
    )


def _convolution(size: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> Layer:
    options = (("stride", stride), ("groups", groups), ("dilation", dilation))
    said = "".join(f" {name} {value}" for name, value in options if value > 1)
    padding = dilation * (size // 2) if size % 2 else 0
    return Layer(
        f"conv {size}×{size}{said}",
        lambda inputs, outputs: sparse.Conv2d(inputs, outputs, size, stride, padding, dilation, groups, bias=False),
        partial(_dense_convolution, size=size, stride=stride, groups=groups, dilation=dilation),
        stride,
    )


def _pool(name: str, size: int, make: Callable[[], nn.Module], dense: Callable[..., dict[str, Tensor]]) -> Layer:
    return Layer(f"{name} {size}×{size} stride 2", lambda *_: make(), partial(dense, size=size), stride=2)


def _dense_convolution(
    parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks, size: int, stride: int, groups: int, dilation: int
) -> dict[str, Tensor]:
    padding = dilation * (size // 2) if size % 2 else 0
    dense = functional.conv2d(maps * masks.before, parameters["weight"], None, stride, padding, dilation, groups)
    return {"output": dense * masks.after}


def _dense_depthwise(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks) -> dict[str, Tensor]:
    weight, bias = parameters["weight"], parameters["bias"]
    dense = functional.conv2d(maps * masks.before, weight, bias, padding=3, groups=maps.shape[1])
    return {"output": dense * masks.after}


def _dense_max_pool(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks, size: int) -> dict[str, Tensor]:
    seen = maps.masked_fill(masks.before == 0, -torch.inf)
    return {"output": functional.max_pool2d(seen, size, 2, size // 2).masked_fill(masks.after == 0, 0)}


def _dense_average_pool(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks, size: int) -> dict[str, Tensor]:
    total = partial(functional.avg_pool2d, kernel_size=size, stride=2, padding=(size - 1) // 2, divisor_override=1)
    return {"output": total(maps * masks.before) / total(masks.before).clamp(min=1) * masks.after}


def _dense_batch_norm(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks) -> dict[str, Tensor]:
    active = maps.permute(0, 2, 3, 1)[masks.before[:, 0] > 0]  # [N, C]
    mean, variance = active.mean(0), active.var(0, unbiased=False)
    normed = (maps - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    dense = normed * parameters["weight"][:, None, None] + parameters["bias"][:, None, None]
    # PyTorch's rule: one tenth of the new mean and of the new unbiased variance, on top of 0 and 1.
    statistics = {"running_mean": 0.1 * mean, "running_var": 0.9 + 0.1 * active.var(0)}
    return {"output": dense * masks.after} | {name: value.detach() for name, value in statistics.items()}


def _dense_layer_norm(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks) -> dict[str, Tensor]:
    mean, variance = maps.mean(1, keepdim=True), maps.var(1, unbiased=False, keepdim=True)
    normed = (maps - mean) / (variance + 1e-6).sqrt()
    dense = normed * parameters["weight"][:, None, None] + parameters["bias"][:, None, None]
    return {"output": dense * masks.after}


def _dense_response_norm(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks) -> dict[str, Tensor]:
    norm = (maps * masks.before).square().sum((2, 3), keepdim=True).sqrt()
    response = norm / (norm.mean(1, keepdim=True) + 1e-6)
    dense = parameters["weight"][:, None, None] * maps * response + parameters["bias"][:, None, None] + maps
    return {"output": dense * masks.after}
