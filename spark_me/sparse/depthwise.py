"""Depthwise convolution: every channel with a kernel of its own.

The `fused` backend lays the rows into dense images for torch's depthwise convolution, in one of two exact ways; on the
CPU by how many sites a patch has along its side:

- *tiles*: every visible patch with a halo of its neighbours; no hidden site costs arithmetic, but halos are copied.
- *raster*: the whole maps, zero where hidden; a few hidden sites cost less than halos wider than the patch.

A GPU takes what was fastest there (`spark_me.sparse.choice`): one of these, or with Triton

- *gather*: a kernel that reads the rows by a neighbour table (`spark_me.sparse.gathered_depthwise`).

The input gradient is the same convolution with the kernel turned round. Images are laid out again in the backward
pass instead of being kept.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spark_me.sparse import choice
from spark_me.sparse.minkowski import ME, Copied
from spark_me.sparse.neighbours import Neighbours, Window
from spark_me.sparse.pyramid import Pyramid
from spark_me.sparse.tensor import SparseTensor, compute_dtype, is_fused, stride_of, with_features
from spark_me.sparse.tiles import images_of, rows_of, tiles_of
from spark_me.weights.kernels import kernel_to_weight, weight_to_kernel

MIN_TILE_SIDE = 8
"""Sites along a patch's side from which tiles are faster than the raster."""
PART_SITES = 1024
"""On CPU, kernel gradients are computed for images of about so many sites at a time, which stay in cache."""


class DepthwiseConv2d(Copied, ME.MinkowskiChannelwiseConvolution):
    """Depthwise convolution of stride 1 with an odd, centred kernel; empty neighbours count as zero.

    `kernel` is [K, C], offsets in MinkowskiEngine's order, and `bias` [1, C]; `spark_me.weights.kernels` brings the
    kernel to torch's layout.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        """
        Args:
            channels: C.
            kernel_size: k, odd.

        Raises:
            ValueError: if the kernel is even.
        """
        if kernel_size % 2 == 0:
            raise ValueError(f"a depthwise kernel is centred on its site: its size is odd, not {kernel_size}")
        super().__init__(channels, kernel_size=kernel_size, bias=True, dimension=2)
        self.kernel_size = kernel_size

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not is_fused(x):
            return super().forward(with_features(x, x.F.to(self.kernel.dtype)))
        dtype = compute_dtype(self.kernel)
        kernel, bias = self.kernel.to(dtype), self.bias.to(dtype)
        inputs = x.F.to(dtype), kernel, bias
        return with_features(x, _convolution(*inputs, x.coordinate_manager, stride_of(x), self.kernel_size))


class _Layout(Protocol):
    """How rows lie in the images that a convolution of stride 1 reads and writes, channels last in memory."""

    kernel_size: int
    padding: int

    def inputs(self, rows: Tensor) -> Tensor:
        """Rows [N, C] → what the convolution reads, zero at empty sites."""

    def outputs(self, rows: Tensor) -> Tensor:
        """Rows [N, C] → images like those that the convolution writes, zero at empty sites."""

    def rows(self, outputs: Tensor) -> Tensor:
        """The visible sites [N, C] of what the convolution wrote."""


class _Tiles:
    """Every visible patch with its halo, written without."""

    padding = 0

    def __init__(self, neighbours: Neighbours, stride: int, kernel_size: int) -> None:
        self.kernel_size = kernel_size
        self._neighbours = neighbours
        self._window = Window(stride, kernel_size, 1)

    def inputs(self, rows: Tensor) -> Tensor:
        return tiles_of(rows, self._window, self._neighbours, empty=0.0)

    def outputs(self, rows: Tensor) -> Tensor:
        return images_of(rows, self._neighbours.side(self._window.in_stride))

    def rows(self, outputs: Tensor) -> Tensor:
        return rows_of(outputs)


class _Raster:
    """The whole maps [B, C, H/s, W/s]."""

    def __init__(self, pyramid: Pyramid, stride: int, kernel_size: int) -> None:
        self.kernel_size = kernel_size
        self.padding = kernel_size // 2
        self._pyramid, self._stride = pyramid, stride

    def inputs(self, rows: Tensor) -> Tensor:
        return self._pyramid.raster(rows, self._stride)

    def outputs(self, rows: Tensor) -> Tensor:
        return self.inputs(rows)

    def rows(self, outputs: Tensor) -> Tensor:
        return rows_of(outputs).index_select(0, self._pyramid.raster_index(self._stride))


def _convolution(rows: Tensor, kernel: Tensor, bias: Tensor, pyramid: Pyramid, stride: int, size: int) -> Tensor:
    if choice.is_open(rows):
        geometry = (stride, size, pyramid.patch_size)
        formulations = _formulations(rows.device, pyramid, stride, size)
        return choice.CHOICES.run("depthwise convolution", geometry, formulations, rows, kernel, bias)
    return _DepthwiseConvolution.apply(rows, kernel, bias, _layout(pyramid, stride, size))


def _formulations(device: torch.device, pyramid: Pyramid, stride: int, size: int) -> choice.Formulations:
    def laid_out(layout: _Layout) -> Callable[..., Tensor]:
        return lambda *inputs: _DepthwiseConvolution.apply(*inputs, layout)

    tiles, raster = _Tiles(pyramid.neighbours, stride, size), _Raster(pyramid, stride, size)
    return {**_gathers(device, pyramid, stride, size), "tiles": laid_out(tiles), "raster": laid_out(raster)}


def _gathers(device: torch.device, pyramid: Pyramid, stride: int, size: int) -> dict[str, Callable[..., Tensor]]:
    if not choice.kernels_run_on(device):
        return {}
    from spark_me.sparse import gathered_depthwise  # Triton is imported where it is used

    def cut(block: int) -> Callable[..., Tensor]:
        window = Window(stride, size, 1)
        table = pyramid.neighbours.inputs_of_outputs
        return lambda x, kernel, bias: gathered_depthwise.convolution(x, kernel, bias, table(window), block)

    return {f"gather {name}": cut(block) for name, block in gathered_depthwise.BLOCKS.items()}


def _layout(pyramid: Pyramid, stride: int, kernel_size: int) -> _Layout:
    if pyramid.neighbours.side(stride) >= MIN_TILE_SIDE:
        return _Tiles(pyramid.neighbours, stride, kernel_size)
    return _Raster(pyramid, stride, kernel_size)


class _DepthwiseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, bias: Tensor, layout: _Layout) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.layout = layout
        return _convolve(rows, kernel, bias.flatten(), layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, kernel = ctx.saved_tensors
        grad_rows = grad_kernel = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = _convolve(gradient, kernel.flip(0), None, ctx.layout)
        if ctx.needs_input_grad[1]:
            correlate = _correlate_in_parts if rows.device.type == "cpu" else _correlate
            weight = correlate(ctx.layout.inputs(rows), ctx.layout.outputs(gradient), ctx.layout)
            grad_kernel = weight_to_kernel(weight, kernel.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = gradient.sum(dim=0, keepdim=True)
        return grad_rows, grad_kernel, grad_bias, None


def _convolve(rows: Tensor, kernel: Tensor, bias: Tensor | None, layout: _Layout) -> Tensor:
    weight = kernel_to_weight(kernel, layout.kernel_size)
    images = layout.inputs(rows)
    return layout.rows(functional.conv2d(images, weight, bias, padding=layout.padding, groups=rows.shape[1]))


def _correlate(inputs: Tensor, gradients: Tensor, layout: _Layout) -> Tensor:
    """The gradient of the weight [C, 1, k, k], from the images and the gradients of those that were written."""
    weight = inputs.new_empty(inputs.shape[1], 1, layout.kernel_size, layout.kernel_size)
    padding, groups = [layout.padding] * 2, inputs.shape[1]
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        gradients, inputs, weight, None, [1, 1], padding, [1, 1], False, [0, 0], groups, [False, True, False]
    )
    return grad_weight


def _correlate_in_parts(inputs: Tensor, gradients: Tensor, layout: _Layout) -> Tensor:
    """As `_correlate`, for the CPU, where torch has no depthwise kernel for it that takes channels last in memory.

    It is a depthwise convolution too: of every channel of every image with its own gradient as the kernel.
    """
    size, channels = layout.kernel_size, inputs.shape[1]
    images = max(1, PART_SITES // (inputs.shape[2] * inputs.shape[3]))
    total = torch.zeros(1, size, size, dtype=torch.promote_types(inputs.dtype, torch.float32)).expand(channels, -1, -1)
    for part, gradient in zip(inputs.split(images), gradients.split(images)):
        merged = part.permute(2, 3, 0, 1).flatten(2).permute(2, 0, 1)[None]  # [1, (n C), h, w]
        kernels = gradient.permute(2, 3, 0, 1).flatten(2).permute(2, 0, 1)[:, None]  # [(n C), 1, h', w']
        products = functional.conv2d(merged, kernels, padding=layout.padding, groups=len(kernels))
        total = total + products.view(-1, channels, size, size).sum(dim=0, dtype=total.dtype)
    return total[:, None].to(inputs.dtype)
