"""The `fused` backend: convolution and pooling on the pyramid's rows, without hash look-ups or colliding scatter.

Two exact formulations, chosen by how many outputs a patch has along its side:

- *tiles*: every visible patch with a halo of its neighbours (zero where hidden) is one small dense image, for the dense
  convolution of torch. The gradient is the adjoint: dense convolution's own, then the halos are added to the patches
  that they came from.
- *pairs*: one matrix product per kernel offset, over the neighbours that are present; hidden ones cost nothing. The
  gradient is the same with the roles exchanged.

Neither keeps what it gathered for the backward pass: gathering again costs less than the memory traffic.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spark_me.sparse.neighbours import Neighbours, Pairs, Window
from spark_me.sparse.tiles import fold, images_of, rows_of, tiles_of
from spark_me.weights.kernels import kernel_to_weight, weight_to_kernel

MIN_TILE_SIDE = 8
"""Outputs along a patch's side from which tiles are faster than gathering (docs/benchmarks.md)."""


def convolution(rows: Tensor, kernel: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Sparse convolution of rows [N_in, Cin] → [N_out, Cout].

    Args:
        rows: features at `window.in_stride`, canonical order.
        kernel: [K, Cin, Cout], or [Cin, Cout] for 1×1 stride 1.
        window: kernel size and strides.
        neighbours: the pyramid's tables.
    """
    if window.kernel_size == 1:
        if window.stride > 1:
            side = neighbours.side(window.in_stride) // window.stride
            blocks = rows.view(-1, side, window.stride, side, window.stride, rows.shape[1])
            rows = blocks[:, :, 0, :, 0].reshape(-1, rows.shape[1])
        return rows @ kernel.view(kernel.shape[-2:])
    if window.kernel_size == window.stride and window.before == 0:
        return _patchify(rows, kernel, window, neighbours)
    if neighbours.side(window.out_stride) >= MIN_TILE_SIDE:
        return _TileConvolution.apply(rows, kernel, window, neighbours)
    return _PairConvolution.apply(rows, kernel, neighbours.pairs(window), neighbours.sites(window.out_stride))


def convolution_to_raster(rows: Tensor, kernel: Tensor, pairs: list[Pairs], places: int) -> Tensor:
    """Sparse convolution with an output at every place of the dense map: [N, Cin] → [B·h·w, Cout].

    Args:
        rows: features, canonical order.
        kernel: [K, Cin, Cout].
        pairs: from `Neighbours.pairs_to_raster`.
        places: B·h·w.
    """
    return _PairConvolution.apply(rows, kernel, pairs, places)


def max_pool(rows: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Maximum over the visible sites under the kernel: [N_in, C] → [N_out, C]."""
    return _TileMaxPool.apply(rows, window, neighbours)


def _patchify(rows: Tensor, kernel: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Convolution whose windows do not overlap: every output has its own inputs, side by side in canonical order."""
    size, side = window.kernel_size, neighbours.side(window.out_stride)
    in_channels, out_channels = kernel.shape[1:]
    blocks = rows.view(-1, side, size, side, size, in_channels).transpose(2, 3)  # M y x ky kx C
    # x varies fastest in the rows: reordering the small kernel leaves longer runs to copy
    matrix = kernel.view(size, size, in_channels, out_channels).transpose(0, 1)
    return blocks.reshape(-1, size**2 * in_channels) @ matrix.reshape(-1, out_channels)


class _TileConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.window, ctx.neighbours = window, neighbours
        tiles = tiles_of(rows, window, neighbours, empty=0.0)
        weight = kernel_to_weight(kernel, window.kernel_size).contiguous(memory_format=torch.channels_last)
        return rows_of(functional.conv2d(tiles, weight, stride=window.stride))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, kernel = ctx.saved_tensors
        window, neighbours = ctx.window, ctx.neighbours
        weight = kernel_to_weight(kernel, window.kernel_size).contiguous(memory_format=torch.channels_last)
        out_side = neighbours.side(window.out_stride)
        grad_tiles, grad_weight, _ = torch.ops.aten.convolution_backward(
            images_of(gradient, out_side),
            tiles_of(rows, window, neighbours, empty=0.0),
            weight,
            None,
            [window.stride, window.stride],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )
        grad_rows = fold(grad_tiles, window, neighbours) if ctx.needs_input_grad[0] else None
        grad_kernel = weight_to_kernel(grad_weight, kernel.shape) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_kernel, None, None


class _PairConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, pairs: list[Pairs], out_rows: int) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.pairs = pairs
        out = rows.new_zeros(out_rows, kernel.shape[2])
        for offset, inputs, outputs in ctx.pairs:
            out.index_add_(0, outputs, rows.index_select(0, inputs) @ kernel[offset])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, kernel = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        grad_kernel = torch.zeros_like(kernel) if ctx.needs_input_grad[1] else None
        for offset, inputs, outputs in ctx.pairs:
            grad_outputs = gradient.index_select(0, outputs)
            if grad_rows is not None:
                grad_rows.index_add_(0, inputs, grad_outputs @ kernel[offset].t())
            if grad_kernel is not None:
                torch.mm(rows.index_select(0, inputs).t(), grad_outputs, out=grad_kernel[offset])
        return grad_rows, grad_kernel, None, None


class _TileMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.window, ctx.neighbours = window, neighbours
        tiles = tiles_of(rows, window, neighbours, empty=float("-inf"))
        return rows_of(functional.max_pool2d(tiles, window.kernel_size, window.stride))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        window, neighbours = ctx.window, ctx.neighbours
        with torch.enable_grad():
            tiles = tiles_of(rows, window, neighbours, empty=float("-inf")).requires_grad_()
            pooled = functional.max_pool2d(tiles, window.kernel_size, window.stride)
        (grad_tiles,) = torch.autograd.grad(pooled, tiles, images_of(gradient, pooled.shape[2]))
        return fold(grad_tiles, window, neighbours), None, None
