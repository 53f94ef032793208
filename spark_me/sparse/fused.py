"""The `fused` backend: convolution and pooling on the pyramid's rows, without hash look-ups or colliding scatter.

Exact formulations of a convolution, of which the CPU takes one of the first two by how many outputs a patch has along
its side; a GPU takes what was fastest there (`spark_me.sparse.choice`):

- *tiles*: every visible patch with a halo of its neighbours (zero where hidden) is one small dense image, for the dense
  convolution of torch. The gradient is the adjoint: dense convolution's own, then the halos are added to the patches
  that they came from.
- *pairs*: one matrix product per kernel offset, over the neighbours that are present; hidden ones cost nothing. The
  gradient is the same with the roles exchanged. Finding them waits for a GPU.
- *implicit_gemm*: one kernel that gathers by a neighbour table (`spark_me.sparse.implicit_gemm`), on GPUs with Triton.

None keeps what it gathered for the backward pass: gathering again costs less than the memory traffic.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spark_me.sparse import choice
from spark_me.sparse.grouped import multiply, multiply_rows, multiply_transposed
from spark_me.sparse.neighbours import Neighbours, Pairs, Window
from spark_me.sparse.pyramid import Pyramid
from spark_me.sparse.tiles import fold, images_of, rows_of, tiles_of
from spark_me.weights.kernels import kernel_to_weight, weight_to_kernel

MIN_TILE_SIDE = 8
"""Outputs along a patch's side from which tiles are faster than gathering (docs/benchmarks.md)."""


def convolution(rows: Tensor, kernel: Tensor, window: Window, neighbours: Neighbours, groups: int = 1) -> Tensor:
    """Sparse convolution of rows [N_in, Cin] → [N_out, Cout].

    Args:
        rows: features at `window.in_stride`, canonical order.
        kernel: [K, Cin/groups, Cout], or [Cin/groups, Cout] for 1×1 stride 1.
        window: kernel size, strides and dilation.
        neighbours: the pyramid's tables.
        groups: in how many groups the channels fall, as in `torch.nn.Conv2d`.
    """
    if window.kernel_size == 1:
        if window.stride > 1:
            side = neighbours.side(window.in_stride) // window.stride
            blocks = rows.view(-1, side, window.stride, side, window.stride, rows.shape[1])
            rows = blocks[:, :, 0, :, 0].reshape(-1, rows.shape[1])
        return multiply(rows, kernel.view(kernel.shape[-2:]), groups)
    if window.span == window.stride and window.before == 0 and groups == 1:
        return _patchify(rows, kernel, window, neighbours)
    if groups == 1 and choice.is_open(rows):
        geometry = (*window, neighbours.patch_size)
        return choice.CHOICES.run("convolution", geometry, _formulations(kernel, window, neighbours), rows, kernel)
    if neighbours.side(window.out_stride) >= MIN_TILE_SIDE:
        return _TileConvolution.apply(rows, kernel, window, neighbours, groups)
    return _PairConvolution.apply(rows, kernel, neighbours.pairs(window), neighbours.sites(window.out_stride), groups)


def convolution_to_raster(rows: Tensor, kernel: Tensor, stride: int, pyramid: Pyramid) -> Tensor:
    """Sparse convolution with an output at every place of the dense map: [N, Cin] → [B·h·w, Cout].

    Args:
        rows: features at `stride`, canonical order.
        kernel: [K, Cin, Cout], odd, centred, of stride 1.
        stride: tensor stride of rows and map.
        pyramid: that the rows lie on.
    """
    size = round(len(kernel) ** 0.5)
    if choice.is_open(rows):
        geometry = (stride, size, pyramid.patch_size)
        formulations = _formulations_to_raster(kernel, stride, size, pyramid)
        return choice.CHOICES.run("convolution to dense", geometry, formulations, rows, kernel)
    return _pairs_to_raster(rows, kernel, stride, size, pyramid)


def max_pool(rows: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Maximum over the visible sites under the kernel: [N_in, C] → [N_out, C]."""
    return _TilePool.apply(rows, window, neighbours, functional.max_pool2d, float("-inf"))


def average_pool(rows: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Mean over the visible sites under the kernel: [N_in, C] → [N_out, C]."""
    sums = partial(functional.avg_pool2d, divisor_override=1)
    return _TilePool.apply(rows, window, neighbours, sums, 0.0) / neighbours.counts(window)


def _formulations(kernel: Tensor, window: Window, neighbours: Neighbours) -> choice.Formulations:
    def tiles(rows: Tensor, kernel: Tensor) -> Tensor:
        return _TileConvolution.apply(rows, kernel, window, neighbours, 1)

    def pairs(rows: Tensor, kernel: Tensor) -> Tensor:
        return _PairConvolution.apply(rows, kernel, neighbours.pairs(window), neighbours.sites(window.out_stride), 1)

    if not choice.kernels_run_on(kernel.device):
        return {"tiles": tiles, "pairs": pairs}
    table, transposed = partial(neighbours.inputs_of_outputs, window), partial(neighbours.outputs_of_inputs, window)
    return {**_implicit_gemms(kernel, table, transposed), "tiles": tiles}


def _formulations_to_raster(kernel: Tensor, stride: int, size: int, pyramid: Pyramid) -> choice.Formulations:
    def dense(rows: Tensor, kernel: Tensor) -> Tensor:
        maps = pyramid.raster(rows, stride)
        return rows_of(functional.conv2d(maps, kernel_to_weight(kernel, size), padding=size // 2))

    def pairs(rows: Tensor, kernel: Tensor) -> Tensor:
        return _pairs_to_raster(rows, kernel, stride, size, pyramid)

    if not choice.kernels_run_on(kernel.device):
        return {"dense": dense, "pairs": pairs}
    table = partial(pyramid.neighbours.inputs_of_places, stride, size)
    transposed = partial(pyramid.neighbours.places_of_inputs, stride, size)
    return {**_implicit_gemms(kernel, table, transposed), "dense": dense}


def _implicit_gemms(
    kernel: Tensor, table: Callable[[], Tensor], transposed: Callable[[], Tensor]
) -> dict[str, Callable[..., Tensor]]:
    from spark_me.sparse import implicit_gemm  # Triton is imported where it is used

    def cut(blocks: implicit_gemm.Blocks) -> Callable[..., Tensor]:
        return lambda rows, kernel: implicit_gemm.convolution(rows, kernel, table(), transposed, blocks)

    _, in_channels, out_channels = kernel.shape
    choices = implicit_gemm.block_choices(kernel.dtype, in_channels, out_channels, kernel.device)
    return {f"implicit_gemm {name}": cut(blocks) for name, blocks in choices.items()}


def _pairs_to_raster(rows: Tensor, kernel: Tensor, stride: int, size: int, pyramid: Pyramid) -> Tensor:
    places = math.prod(pyramid.extent(stride))
    return _PairConvolution.apply(rows, kernel, pyramid.neighbours.pairs_to_raster(stride, size), places, 1)


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
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, window: Window, neighbours: Neighbours, groups: int) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.window, ctx.neighbours, ctx.groups = window, neighbours, groups
        tiles = tiles_of(rows, window, neighbours, empty=0.0)
        weight = kernel_to_weight(kernel, window.kernel_size).contiguous(memory_format=torch.channels_last)
        return rows_of(functional.conv2d(tiles, weight, None, window.stride, 0, window.dilation, groups))

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
            [window.dilation, window.dilation],
            False,
            [0, 0],
            ctx.groups,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )
        grad_rows = fold(grad_tiles, window, neighbours) if ctx.needs_input_grad[0] else None
        grad_kernel = weight_to_kernel(grad_weight, kernel.shape) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_kernel, None, None, None


class _PairConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, pairs: list[Pairs], out_rows: int, groups: int) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.pairs, ctx.groups = pairs, groups
        out = rows.new_zeros(out_rows, kernel.shape[2])
        for offset, inputs, outputs in ctx.pairs:
            out.index_add_(0, outputs, multiply(rows.index_select(0, inputs), kernel[offset], groups))
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
                grad_rows.index_add_(0, inputs, multiply_transposed(grad_outputs, kernel[offset], ctx.groups))
            if grad_kernel is not None:
                multiply_rows(rows.index_select(0, inputs), grad_outputs, ctx.groups, out=grad_kernel[offset])
        return grad_rows, grad_kernel, None, None, None


class _TilePool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, window: Window, neighbours: Neighbours, pool: Callable[..., Tensor], empty: float
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.window, ctx.neighbours, ctx.pool, ctx.empty = window, neighbours, pool, empty
        return rows_of(pool(tiles_of(rows, window, neighbours, empty), window.kernel_size, window.stride))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        window, neighbours = ctx.window, ctx.neighbours
        with torch.enable_grad():
            tiles = tiles_of(rows, window, neighbours, ctx.empty).requires_grad_()
            pooled = ctx.pool(tiles, window.kernel_size, window.stride)
        (grad_tiles,) = torch.autograd.grad(pooled, tiles, images_of(gradient, pooled.shape[2]))
        return fold(grad_tiles, window, neighbours), None, None, None, None
