"""Proof of the installed engine: its layers against dense torch on masked images, in float64, forward and backward.

The references are written out here in plain torch, apart from the rest of spark_me: the input is masked, the dense
operation runs, its output is masked at the output's resolution.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from spark_me import sparse

TOLERANCE = 1e-9
_PATCH = 8
_GRID = (3, 4)
_CHANNELS = 4


@dataclass(frozen=True)
class Result:
    """How far one layer is from dense torch: `error` is relative to the largest value, the worst of all it compares."""

    name: str
    error: float

    @property
    def ok(self) -> bool:
        """Whether the two agree; a NaN does not."""
        return self.error <= TOLERANCE


@dataclass(frozen=True)
class Case:
    """Masked images: random [B, C, H, W] float64 and `visible` bool [B, fh, fw]."""

    images: Tensor
    visible: Tensor

    def mask(self, stride: int) -> Tensor:
        """1 at the active sites of a stride, else 0: float64 [B, 1, H/s, W/s]."""
        side = _PATCH // stride
        return self.visible[:, None].repeat_interleave(side, 2).repeat_interleave(side, 3).double()


Pairs = Iterator[tuple[Tensor, Tensor]]
Check = Callable[[Case], Pairs]


def run_checks(device: str) -> Iterator[Result]:
    """Compare each layer with dense torch on `device`, one result after the other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = _draw_case(device)
        for name, check in _checks().items():
            yield Result(f"{name} ({device})", max(_error(ours, reference) for ours, reference in check(case)))


def _checks() -> dict[str, Check]:
    convolutions = {"conv 1×1": (1, 1), "conv 3×3": (3, 1), "conv 7×7 stride 2": (7, 2), "conv 3×3 stride 2": (3, 2)}
    convolutions |= {"conv 1×1 stride 2": (1, 2), "conv 2×2 stride 2": (2, 2)}
    checks: dict[str, Check] = {name: partial(_conv, size=k, stride=s) for name, (k, s) in convolutions.items()}
    return checks | {"max-pool 3×3 stride 2": _max_pool, "batch norm": _batch_norm}


def _draw_case(device: str) -> Case:
    """Random masks, with one image that is all visible and one that shows a single corner patch."""
    visible = torch.rand(5, *_GRID) < 0.4
    visible[0] = True
    visible[1] = False
    visible[1, -1, -1] = True
    visible[2:, 0, 0] = True
    images = torch.randn(5, _CHANNELS, _GRID[0] * _PATCH, _GRID[1] * _PATCH, dtype=torch.float64)
    return Case(images.to(device), visible.to(device))


def _conv(case: Case, size: int, stride: int) -> Pairs:
    layer = sparse.Conv2d(_CHANNELS, 6, size, stride).to(case.images)
    kernel = layer.kernel.detach().clone().requires_grad_()
    # The engine counts kernel offsets with the first spatial axis, y, fastest.
    weight = kernel.view(size, size, _CHANNELS, 6).permute(3, 2, 1, 0)
    ours, our_images = _run(case, layer)
    images = case.images.clone().requires_grad_()
    padding = size // 2 if size % 2 else 0
    dense = functional.conv2d(images * case.mask(1), weight, stride=stride, padding=padding) * case.mask(stride)
    _backward(ours, dense)
    yield from ((ours, dense), (_grad(our_images), _grad(images)), (_grad(layer.kernel), _grad(kernel)))


def _max_pool(case: Case) -> Pairs:
    ours, our_images = _run(case, sparse.MaxPool2d(3, 2))
    images = case.images.clone().requires_grad_()
    seen = images.masked_fill(case.mask(1) == 0, -torch.inf)
    dense = functional.max_pool2d(seen, 3, stride=2, padding=1).masked_fill(case.mask(2) == 0, 0)
    _backward(ours, dense)
    yield from ((ours, dense), (_grad(our_images), _grad(images)))


def _batch_norm(case: Case) -> Pairs:
    layer = sparse.BatchNorm(_CHANNELS).to(case.images)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (layer.weight, layer.bias))
    ours, our_images = _run(case, layer)
    images = case.images.clone().requires_grad_()
    active = images.permute(0, 2, 3, 1)[case.mask(1)[:, 0] > 0]  # [N, C]
    mean, variance = active.mean(0), active.var(0, unbiased=False)
    normed = (images - mean[:, None, None]) / (variance[:, None, None] + layer.eps).sqrt()
    dense = (normed * weight[:, None, None] + bias[:, None, None]) * case.mask(1)
    _backward(ours, dense)
    yield from ((ours, dense), (_grad(our_images), _grad(images)))
    yield from ((_grad(layer.weight), _grad(weight)), (_grad(layer.bias), _grad(bias)))
    # PyTorch's rule: one tenth of the new mean and of the new unbiased variance, on top of 0 and 1.
    statistics = dict(layer.named_buffers())
    yield statistics["running_mean"], 0.1 * mean
    yield statistics["running_var"], 0.9 + 0.1 * active.var(0)


def _run(case: Case, layer: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """A sparse layer's output, dense, and the images to find its input gradient at."""
    images = case.images.clone().requires_grad_()
    pyramid = sparse.Pyramid(case.visible, _PATCH)
    return sparse.to_dense(layer(sparse.to_sparse(images, pyramid))), images


def _backward(ours: Tensor, dense: Tensor) -> None:
    cotangent = torch.randn_like(dense)
    ours.backward(cotangent)
    dense.backward(cotangent)


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max().clamp(min=1)).item()
