"""A transposed convolution followed by a convolution, as one convolution at the lower resolution: exact.

A decoder block upsamples (4×4, stride 2, padding 1) and convolves (3×3, padding 1) with nothing non-linear between.
Each of the 2×2 output phases depends on 3×3 inputs, through a kernel composed of the two: 9 products for an output
and channel pair instead of 4 + 9, and the upsampled map never exists.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

COMPOSING_PRODUCTS = 16 * 9
"""Products for each triple of channels that composing the kernels costs: all taps of one with all of the other."""


def pays_off(x: Tensor, channels: int) -> bool:
    """Whether x [B, C, h, w] has so many pixels that composing kernels costs a quarter of the gain at most."""
    saved = 4 * x.shape[0] * 4 * x.shape[2] * x.shape[3]  # for each pair of channels
    return saved >= 4 * COMPOSING_PRODUCTS * channels


def upsample_and_convolve(x: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor) -> Tensor:
    """`conv2d(conv_transpose2d(x, up_weight, up_bias, stride=2, padding=1), weight, padding=1)`.

    Args:
        x: [B, Cin, h, w].
        up_weight: [Cin, Cmid, 4, 4].
        up_bias: [Cmid].
        weight: [Cout, Cmid, 3, 3].

    Returns:
        [B, Cout, 2h, 2w], channels last in memory.
    """
    batch, _, height, width = x.shape
    constant = (weight.sum(dim=(2, 3)) @ up_bias).repeat(4)
    x, *sides = _WithSides.apply(x.contiguous(memory_format=torch.channels_last))
    phases = functional.conv2d(x, _compose(up_weight, weight), constant, padding=1)  # [B, (2 2 Cout), h, w]
    phases = phases.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, -1)
    out = phases.transpose(2, 3).reshape(batch, 2 * height, 2 * width, -1)
    borders = [border.to(out.dtype) for border in _beyond_border(sides, up_weight, up_bias, weight)]
    return _SubtractBorders.apply(out, *borders).permute(0, 3, 1, 2)


def _compose(up_weight: Tensor, weight: Tensor) -> Tensor:
    """From the 3×3 inputs around a site to its 2×2 outputs: [(2 2 Cout), Cin, 3, 3]."""
    # One transposed convolution of stride 2 has both effects. Its 6×6 kernel, at t = y − 2i for input i and output y
    # (t from −2): the sum over k of weight[k] · up_weight[t + k].
    products = torch.einsum("imuv,omkl->kliouv", up_weight, weight)  # every tap with every tap, once
    full = torch.stack(
        [
            functional.pad(products[down, across], (2 - across, across, 2 - down, down))
            for down in range(3)
            for across in range(3)
        ]
    ).sum(dim=0)  # [Cin, Cout, 6, 6]
    # Output 2j + phase takes input j + d through t = phase − 2d, for d = −1, 0, 1. In slices: a list of indices would
    # make the host wait for a GPU.
    kernels = [full[:, :, down::2, across::2].flip(2, 3) for down in (0, 1) for across in (0, 1)]
    return torch.stack(kernels).transpose(1, 2).flatten(0, 1)


def _beyond_border(sides: Sequence[Tensor], up_weight: Tensor, up_bias: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """What the composed kernel adds to the first and last row and column of the output, and must not.

    It sees the upsampled map go on one pixel beyond its border, where the 3×3 convolution has its zero padding. That
    ring is a one-dimensional transposed convolution of the input's own border; corners count with the rows.
    """
    taps = (up_weight[:, :, 0], up_weight[:, :, 3], up_weight[:, :, :, 0], up_weight[:, :, :, 3])
    top, bottom, left, right = (
        functional.conv_transpose1d(side, tap, up_bias, stride=2) for side, tap in zip(sides, taps)
    )
    left, right = (functional.pad(side[:, :, 1:-1], (1, 1)) for side in (left, right))
    return (
        functional.conv1d(top, weight[:, :, 0]),
        functional.conv1d(bottom, weight[:, :, 2]),
        functional.conv1d(left, weight[:, :, :, 0]),
        functional.conv1d(right, weight[:, :, :, 2]),
    )


class _WithSides(torch.autograd.Function):
    """A map [B, C, H, W] and its first and last row and column: autograd's own slices would make a map of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.view_as(x), *(side.clone() for side in _sides(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *of_sides: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.channels_last)
        for part, of_side in zip(_sides(gradient), of_sides):
            part += of_side
        return gradient


class _SubtractBorders(torch.autograd.Function):
    """Subtract from the border of a map [B, H, W, C] in place: autograd's own slices would copy the map four times.

    It takes the map itself, not its view [B, C, H, W]: in place on a view, autograd copies as well.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, *borders: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        for part, border in zip(_sides(out.permute(0, 3, 1, 2)), borders):
            part -= border
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(-part for part in _sides(gradient.permute(0, 3, 1, 2)))


def _sides(x: Tensor) -> tuple[Tensor, ...]:
    """First and last row and column of x [B, C, H, W], as views [B, C, length]."""
    return x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]
