"""The `native` backend: convolution and pooling on the pyramid's rows, without hash look-ups or colliding scatter.

Exact formulations of a convolution, of which the CPU takes one of the first two by how many outputs a patch has along
its side; a GPU takes what was fastest there (`spark_me.sparse.choice`):

- *tiles*: every visible patch with a halo of its neighbours (zero where hidden) is one small dense image, for the dense
  convolution of torch. The gradient is the adjoint: dense convolution's own, then the halos are added to the patches
  that they came from.
- *pairs*: one matrix product per kernel offset, over the neighbours that are present; hidden ones cost nothing. The
  gradient is the same with the roles exchanged. Finding them waits for a GPU.
- *implicit_gemm*: one kernel that gathers by a neighbour table (`spark_me.sparse.implicit_gemm`), on GPUs with Triton.

None keeps what it gathered for the backward pass: gathering again costs less than the memory traffic.

Weights are torch's, [Cout, Cin/groups, kh, kw]. With channels last in memory (as encoders keep them) the matrix of a
kernel offset is a view that the matrix product takes as it is, and torch's convolution takes the whole.
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
from spark_me.sparse.minkowski import weight_to_kernel
from spark_me.sparse.neighbours import Neighbours, Pair, Pairs, Window
from spark_me.sparse.pyramid import Pyramid
from spark_me.sparse.tiles import every, fold, images_of, rows_of, tile_shape, tiles_of

MIN_TILE_SIDE = 8
"""Outputs along a patch's side from which tiles are faster than gathering (docs/benchmarks.md)."""


def convolution(rows: Tensor, weight: Tensor, window: Window, neighbours: Neighbours, groups: int = 1) -> Tensor:
    """Sparse convolution of rows [N_in, Cin] → [N_out, Cout].

    Args:
        rows: features at `window.in_stride`, canonical order.
        weight: [Cout, Cin/groups, kh, kw].
        window: kernel size, strides and dilation.
        neighbours: the pyramid's tables.
        groups: in how many groups the channels fall, as in `torch.nn.Conv2d`.
    """
    if window.volume == 1 and window.before == (0, 0):
        if window.stride > 1:
            rows = every(rows, window.stride, neighbours.side(window.in_stride))
        return multiply(rows, weight.flatten(1), groups)  # a view, whose gradient is one, too
    if window.span == (window.stride, window.stride) and window.before == (0, 0) and groups == 1:
        return _patchify(rows, weight, window, neighbours)
    if groups == 1 and choice.is_open(rows):
        geometry = (window.in_stride, *window.size, window.stride, *window.dilation, *window.before)
        formulations = _formulations(weight, window, neighbours)
        return choice.CHOICES.run("convolution", (*geometry, neighbours.patch_size), formulations, rows, weight)
    # On a GPU, groups stay with tiles: finding pairs would wait for it.
    if neighbours.side(window.out_stride) >= MIN_TILE_SIDE or rows.is_cuda:
        return _TileConvolution.apply(rows, weight, window, neighbours, groups)
    return _PairConvolution.apply(rows, weight, neighbours.pairs(window), neighbours.sites(window.out_stride), groups)


def convolution_to_raster(rows: Tensor, weight: Tensor, stride: int, pyramid: Pyramid) -> Tensor:
    """Sparse convolution with an output at every place of the dense map: [N, Cin] → [B·h·w, Cout].

    Args:
        rows: features at `stride`, canonical order.
        weight: [Cout, Cin, k, k], k odd: the kernel is centred and of stride 1.
        stride: tensor stride of rows and map.
        pyramid: that the rows lie on.
    """
    if choice.is_open(rows):
        geometry = (stride, weight.shape[-1], pyramid.patch_size)
        formulations = _formulations_to_raster(weight, stride, pyramid)
        return choice.CHOICES.run("convolution to dense", geometry, formulations, rows, weight)
    return _pairs_to_raster(rows, weight, stride, pyramid)


def max_pool(rows: Tensor, window: Window, neighbours: Neighbours, zero_padding: bool = False) -> Tensor:
    """Maximum over the visible sites under the kernel: [N_in, C] → [N_out, C].

    Args:
        rows: features, canonical order.
        window: kernel size, strides and dilation.
        neighbours: the pyramid's tables.
        zero_padding: whether places beyond the map are zero; or else they are ignored.
    """
    pool = _max_pool
    if zero_padding:
        (top, left), shape = window.before, tile_shape(window, neighbours)
        outside = neighbours.outside_of_map(window.in_stride, (-top, -left), shape)
        pool = partial(_max_pool, outside=outside[:, None])
    return _TilePool.apply(rows, window, neighbours, pool, float("-inf"))


def sum_pool(rows: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Sum over the visible sites under the kernel: [N_in, C] → [N_out, C]."""
    return _TilePool.apply(rows, window, neighbours, _sum_pool, 0.0)


def _max_pool(images: Tensor, window: Window, outside: Tensor | None = None) -> Tensor:
    images = images if outside is None else images.masked_fill(outside, 0)
    return functional.max_pool2d(images, window.size, window.stride, dilation=window.dilation)


def _sum_pool(images: Tensor, window: Window) -> Tensor:
    return functional.avg_pool2d(images, window.size, window.stride, divisor_override=1)


def _formulations(weight: Tensor, window: Window, neighbours: Neighbours) -> choice.Formulations:
    def tiles(rows: Tensor, weight: Tensor) -> Tensor:
        return _TileConvolution.apply(rows, weight, window, neighbours, 1)

    def pairs(rows: Tensor, weight: Tensor) -> Tensor:
        return _PairConvolution.apply(rows, weight, neighbours.pairs(window), neighbours.sites(window.out_stride), 1)

    if not choice.kernels_run_on(weight.device):
        return {"tiles": tiles, "pairs": pairs}
    table, transposed = partial(neighbours.inputs_of_outputs, window), partial(neighbours.outputs_of_inputs, window)
    return {**_implicit_gemms(weight, table, transposed), "tiles": tiles}


def _formulations_to_raster(weight: Tensor, stride: int, pyramid: Pyramid) -> choice.Formulations:
    size = weight.shape[-1]

    def dense(rows: Tensor, weight: Tensor) -> Tensor:
        return rows_of(functional.conv2d(pyramid.raster(rows, stride), weight, padding=size // 2))

    def pairs(rows: Tensor, weight: Tensor) -> Tensor:
        return _pairs_to_raster(rows, weight, stride, pyramid)

    if not choice.kernels_run_on(weight.device):
        return {"dense": dense, "pairs": pairs}
    table = partial(pyramid.neighbours.inputs_of_places, stride, size)
    transposed = partial(pyramid.neighbours.places_of_inputs, stride, size)
    return {**_implicit_gemms(weight, table, transposed), "dense": dense}


def _implicit_gemms(
    weight: Tensor, table: Callable[[], Tensor], transposed: Callable[[], Tensor]
) -> dict[str, Callable[..., Tensor]]:
    from spark_me.sparse import implicit_gemm  # Triton is imported where it is used

    def cut(blocks: implicit_gemm.Blocks) -> Callable[..., Tensor]:
        return lambda rows, weight: implicit_gemm.convolution(
            rows, weight_to_kernel(weight), table(), transposed, blocks
        )

    out_channels, in_channels = weight.shape[:2]
    choices = implicit_gemm.block_choices(weight.dtype, in_channels, out_channels, weight.device)
    return {f"implicit_gemm {name}": cut(blocks) for name, blocks in choices.items()}


def _pairs_to_raster(rows: Tensor, weight: Tensor, stride: int, pyramid: Pyramid) -> Tensor:
    places = math.prod(pyramid.extent(stride))
    pairs = pyramid.neighbours.pairs_to_raster(stride, weight.shape[-1])
    return _PairConvolution.apply(rows, weight, pairs, places, 1)


def _patchify(rows: Tensor, weight: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Convolution whose windows do not overlap: every output has its own inputs, side by side in canonical order."""
    size, side = window.stride, neighbours.side(window.out_stride)
    blocks = rows.view(-1, side, size, side, size, rows.shape[1]).transpose(2, 3)  # M y x ky kx C
    if window.dilation != (1, 1):
        blocks = blocks[:, :, :, :: window.dilation[0], :: window.dilation[1]]
    matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
    return functional.linear(blocks.reshape(-1, matrix.shape[1]), matrix)


class _TileConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, window: Window, neighbours: Neighbours, groups: int) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.window, ctx.neighbours, ctx.groups = window, neighbours, groups
        tiles = tiles_of(rows, window, neighbours, empty=0.0)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return rows_of(functional.conv2d(tiles, weight, None, window.stride, 0, window.dilation, groups))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        window, neighbours = ctx.window, ctx.neighbours
        weight = weight.contiguous(memory_format=torch.channels_last)
        out_side = neighbours.side(window.out_stride)
        grad_tiles, grad_weight, _ = torch.ops.aten.convolution_backward(
            images_of(gradient, out_side),
            tiles_of(rows, window, neighbours, empty=0.0),
            weight,
            None,
            [window.stride, window.stride],
            [0, 0],
            [*window.dilation],
            False,
            [0, 0],
            ctx.groups,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )
        grad_rows = fold(grad_tiles, window, neighbours) if ctx.needs_input_grad[0] else None
        return grad_rows, grad_weight if ctx.needs_input_grad[1] else None, None, None, None


class _PairConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, pairs: list[Pairs], out_rows: int, groups: int) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.pairs, ctx.groups = pairs, groups
        out = rows.new_zeros(out_rows, len(weight))
        for offset, inputs, outputs in ctx.pairs:
            out.index_add_(0, outputs, multiply(rows.index_select(0, inputs), _matrix(weight, offset), groups))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for offset, inputs, outputs in ctx.pairs:
            grad_outputs = gradient.index_select(0, outputs)
            if grad_rows is not None:
                products = multiply_transposed(grad_outputs, _matrix(weight, offset), ctx.groups)
                grad_rows.index_add_(0, inputs, products)
            if grad_weight is not None:
                own = rows.index_select(0, inputs)
                multiply_rows(grad_outputs, own, ctx.groups, out=_matrix(grad_weight, offset))
        return grad_rows, grad_weight, None, None, None


def _matrix(weight: Tensor, offset: Pair) -> Tensor:
    """Of one kernel offset (down, across): a view [Cout, Cin/groups]."""
    return weight[:, :, offset[0], offset[1]]


class _TilePool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, window: Window, neighbours: Neighbours, pool: Callable[..., Tensor], empty: float
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.window, ctx.neighbours, ctx.pool, ctx.empty = window, neighbours, pool, empty
        return rows_of(pool(tiles_of(rows, window, neighbours, empty), window))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        window, neighbours = ctx.window, ctx.neighbours
        with torch.enable_grad():
            tiles = tiles_of(rows, window, neighbours, ctx.empty).requires_grad_()
            pooled = ctx.pool(tiles, window)
        (grad_tiles,) = torch.autograd.grad(pooled, tiles, images_of(gradient, pooled.shape[2]))
        return fold(grad_tiles, window, neighbours), None, None, None, None
