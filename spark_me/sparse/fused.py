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


class _TileConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.window, ctx.neighbours = window, neighbours
        tiles = _tiles(rows, window, neighbours, empty=0.0)
        weight = kernel_to_weight(kernel, window.kernel_size).contiguous(memory_format=torch.channels_last)
        return _rows_of(functional.conv2d(tiles, weight, stride=window.stride))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, kernel = ctx.saved_tensors
        window, neighbours = ctx.window, ctx.neighbours
        weight = kernel_to_weight(kernel, window.kernel_size).contiguous(memory_format=torch.channels_last)
        out_side = neighbours.side(window.out_stride)
        grad_tiles, grad_weight, _ = torch.ops.aten.convolution_backward(
            _images_of(gradient, out_side),
            _tiles(rows, window, neighbours, empty=0.0),
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
        grad_rows = _fold(grad_tiles, window, neighbours) if ctx.needs_input_grad[0] else None
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
        tiles = _tiles(rows, window, neighbours, empty=float("-inf"))
        return _rows_of(functional.max_pool2d(tiles, window.kernel_size, window.stride))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        window, neighbours = ctx.window, ctx.neighbours
        with torch.enable_grad():
            tiles = _tiles(rows, window, neighbours, empty=float("-inf")).requires_grad_()
            pooled = functional.max_pool2d(tiles, window.kernel_size, window.stride)
        (grad_tiles,) = torch.autograd.grad(pooled, tiles, _images_of(gradient, pooled.shape[2]))
        return _fold(grad_tiles, window, neighbours), None, None


def _gather(rows: Tensor, table: Tensor, empty: float = 0.0) -> Tensor:
    """rows [N, C] and table [M, K] → [M, K·C]; `empty` where the table says N."""
    padded = functional.pad(rows, (0, 0, 0, 1), value=empty)
    return padded.index_select(0, table.flatten()).view(table.shape[0], -1)


def _tiles(rows: Tensor, window: Window, neighbours: Neighbours, empty: float) -> Tensor:
    """Every visible patch with the halo that the window needs: [M, C, L, L], channels last in memory."""
    length = _tile_length(window, neighbours)
    table = neighbours.of_tiles(window.in_stride, -window.before, length)
    tiles = _gather(rows, table.flatten(1), empty)
    return tiles.view(-1, length, length, rows.shape[1]).permute(0, 3, 1, 2)


def _tile_length(window: Window, neighbours: Neighbours) -> int:
    out_side = neighbours.side(window.out_stride)
    return (out_side - 1) * window.stride + window.kernel_size


def _fold(tiles: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Adjoint of `_tiles`: add every tile's halo to the patch that it came from, [M, C, L, L] → [N, C]."""
    side, length, start = neighbours.side(window.in_stride), tiles.shape[2], window.before
    images = tiles.permute(0, 2, 3, 1)
    folded = images[:, start : start + side, start : start + side].contiguous()
    steps = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1) if down or across]
    for down, across in steps:
        # the tile of the patch `down`, `across` of mine starts here in my coordinates
        mine_y, theirs_y = _overlap(down * side - start, length, side)
        mine_x, theirs_x = _overlap(across * side - start, length, side)
        if mine_y.start < mine_y.stop and mine_x.start < mine_x.stop:
            adjacent = neighbours.of_tiles(neighbours.patch_size, -1, 3)[:, 1 + down, 1 + across]
            halo = functional.pad(images[:, theirs_y, theirs_x], (0, 0, 0, 0, 0, 0, 0, 1))
            folded[:, mine_y, mine_x] += halo.index_select(0, adjacent)
    return folded.view(-1, tiles.shape[1])


def _overlap(start: int, length: int, side: int) -> tuple[slice, slice]:
    """Where [start, start + length) overlaps [0, side), in the coordinates of the latter and of the former."""
    first, last = max(0, start), min(side, start + length)
    return slice(first, last), slice(first - start, last - start)


def _rows_of(images: Tensor) -> Tensor:
    """[M, C, side, side] → rows [M·side², C]."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _images_of(rows: Tensor, side: int) -> Tensor:
    """Rows [M·side², C] → [M, C, side, side], channels last in memory."""
    return rows.reshape(-1, side, side, rows.shape[1]).permute(0, 3, 1, 2)
