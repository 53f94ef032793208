"""Depthwise convolution: every channel with a kernel of its own.

The `native` backend lays the rows into dense images for torch's depthwise convolution, in one of two exact ways; on the
CPU by how many sites a patch has along its side:

- *tiles*: every visible patch with a halo of its neighbours; no hidden site costs arithmetic, but halos are copied.
- *raster*: the whole maps, zero where hidden; a few hidden sites cost less than halos wider than the patch.

A GPU takes what was fastest there (`spark_me.sparse.kernels.autotune`): one of these, or with Triton

- *gather*: a kernel that reads the rows by a neighbour table (`spark_me.sparse.kernels.depthwise`).

The input gradient is the same convolution with the kernel turned round. Images are laid out again in the backward
pass instead of being kept.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spark_me.sparse.kernels import autotune
from spark_me.sparse.minkowski import weight_to_kernel
from spark_me.sparse.neighbours import MIN_TILE_SIDE, Neighbours, Pair, Window, images_of, rows_of, tiles_of
from spark_me.sparse.pyramid import Pyramid

PART_SITES = 1024
"""On CPU, kernel gradients are computed for images of about so many sites at a time, which stay in cache."""


def takes(weight: Tensor, window: Window, groups: int) -> bool:
    """Whether a convolution is depthwise, of stride 1 and centred."""
    same = window.span == tuple(2 * before + 1 for before in window.before)
    return groups > 1 and weight.shape[:2] == (groups, 1) and window.stride == 1 and same and window.volume > 1


def convolution(rows: Tensor, weight: Tensor, bias: Tensor | None, pyramid: Pyramid, window: Window) -> Tensor:
    """Depthwise convolution of stride 1: rows [N, C] → [N, C].

    Args:
        rows: features, canonical order; they say in which dtype to compute.
        weight: [C, 1, kh, kw], odd along both axes.
        bias: [C].
        pyramid: that the rows lie on.
        window: centred.
    """
    if autotune.is_open(rows):
        geometry = (window.in_stride, *window.size, *window.dilation, pyramid.patch_size)
        bias = weight.new_zeros(len(weight)) if bias is None else bias  # what is measured takes tensors alone
        algorithms = _algorithms(rows.device, pyramid, window)
        return autotune.CHOICES.run("depthwise convolution", geometry, algorithms, rows, weight, bias)
    return _DepthwiseConvolution.apply(rows, weight, bias, _layout(pyramid, window))


class _Layout(Protocol):
    """How rows lie in the images that a convolution of stride 1 reads and writes, channels last in memory."""

    window: Window
    padding: Pair

    def inputs(self, rows: Tensor) -> Tensor:
        """Rows [N, C] → what the convolution reads, zero at empty sites."""

    def outputs(self, rows: Tensor) -> Tensor:
        """Rows [N, C] → images like those that the convolution writes, zero at empty sites."""

    def rows(self, outputs: Tensor) -> Tensor:
        """The visible sites [N, C] of what the convolution wrote."""


class _Tiles:
    """Every visible patch with its halo, written without."""

    padding = (0, 0)

    def __init__(self, neighbours: Neighbours, window: Window) -> None:
        self.window = window
        self._neighbours = neighbours

    def inputs(self, rows: Tensor) -> Tensor:
        return tiles_of(rows, self.window, self._neighbours, empty=0.0)

    def outputs(self, rows: Tensor) -> Tensor:
        return images_of(rows, self._neighbours.side(self.window.in_stride))

    def rows(self, outputs: Tensor) -> Tensor:
        return rows_of(outputs)


class _Raster:
    """The whole maps [B, C, H/s, W/s]."""

    def __init__(self, pyramid: Pyramid, window: Window) -> None:
        self.window = window
        self.padding = window.before
        self._pyramid = pyramid

    def inputs(self, rows: Tensor) -> Tensor:
        return self._pyramid.raster(rows, self.window.in_stride)

    def outputs(self, rows: Tensor) -> Tensor:
        return self.inputs(rows)

    def rows(self, outputs: Tensor) -> Tensor:
        return rows_of(outputs).index_select(0, self._pyramid.raster_index(self.window.in_stride))


def _algorithms(device: torch.device, pyramid: Pyramid, window: Window) -> autotune.Algorithms:
    def laid_out(layout: _Layout) -> Callable[..., Tensor]:
        return lambda *inputs: _DepthwiseConvolution.apply(*inputs, layout)

    tiles, raster = _Tiles(pyramid.neighbours, window), _Raster(pyramid, window)
    return {**_gathers(device, pyramid, window), "tiles": laid_out(tiles), "raster": laid_out(raster)}


def _gathers(device: torch.device, pyramid: Pyramid, window: Window) -> dict[str, Callable[..., Tensor]]:
    if not autotune.kernels_run_on(device) or window.size[0] != window.size[1]:
        return {}
    from spark_me.sparse.kernels import depthwise  # Triton is imported where it is used

    def cut(block: int) -> Callable[..., Tensor]:
        table = pyramid.neighbours.inputs_of_outputs
        return lambda x, weight, bias: depthwise.convolution(
            x, weight_to_kernel(weight)[:, 0], bias, table(window), block
        )

    return {f"gather {name}": cut(block) for name, block in depthwise.BLOCKS.items()}


def _layout(pyramid: Pyramid, window: Window) -> _Layout:
    tiles = pyramid.neighbours.side(window.in_stride) >= MIN_TILE_SIDE
    return _Tiles(pyramid.neighbours, window) if tiles else _Raster(pyramid, window)


class _DepthwiseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, layout: _Layout) -> Tensor:
        weight, bias = weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
        ctx.save_for_backward(rows, weight)
        ctx.layout = layout
        return _convolve(rows, weight, bias, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = _convolve(gradient, weight.flip(2, 3), None, ctx.layout)
        if ctx.needs_input_grad[1]:
            correlate = _correlate_in_parts if rows.device.type == "cpu" else _correlate
            grad_weight = correlate(ctx.layout.inputs(rows), ctx.layout.outputs(gradient), ctx.layout)
        if ctx.needs_input_grad[2]:
            grad_bias = gradient.sum(dim=0)
        return grad_rows, grad_weight, grad_bias, None


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, layout: _Layout) -> Tensor:
    images, dilation = layout.inputs(rows), layout.window.dilation
    return layout.rows(functional.conv2d(images, weight, bias, 1, layout.padding, dilation, rows.shape[1]))


def _correlate(inputs: Tensor, gradients: Tensor, layout: _Layout) -> Tensor:
    """The gradient of the weight [C, 1, k, k], from the images and the gradients of those that were written."""
    channels, padding, dilation = inputs.shape[1], [*layout.padding], [*layout.window.dilation]
    weight = inputs.new_empty(channels, 1, *layout.window.size)
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        gradients, inputs, weight, None, [1, 1], padding, dilation, False, [0, 0], channels, [False, True, False]
    )
    return grad_weight


def _correlate_in_parts(inputs: Tensor, gradients: Tensor, layout: _Layout) -> Tensor:
    """As `_correlate`, for the CPU, where torch has no depthwise kernel for it that takes channels last in memory.

    It is a depthwise convolution too: of every channel of every image with its own gradient as the kernel.
    """
    channels = inputs.shape[1]
    images = max(1, PART_SITES // (inputs.shape[2] * inputs.shape[3]))
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    total = torch.zeros(channels, *layout.window.size, dtype=dtype)
    for part, gradient in zip(inputs.split(images), gradients.split(images)):
        merged = part.permute(2, 3, 0, 1).flatten(2).permute(2, 0, 1)[None]  # [1, (n C), h, w]
        kernels = gradient.permute(2, 3, 0, 1).flatten(2).permute(2, 0, 1)[:, None]  # [(n C), 1, h', w']
        products = functional.conv2d(
            merged, kernels, padding=layout.padding, stride=layout.window.dilation, groups=len(kernels)
        )
        total = total + products.view(-1, *total.shape).sum(dim=0, dtype=dtype)
    return total[:, None].to(inputs.dtype)
