"""The `native` backend: convolution and pooling on the pyramid's rows, without hash look-ups or colliding scatter.

Products are in the dtype of the rows, whatever that of the weight: an algorithm that has the weight's gradient in
float32 hands it on so, as a sum in half precision may overflow.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spark_me.sparse.kernels import autotune
from spark_me.sparse.minkowski import weight_to_kernel
from spark_me.sparse.neighbours import (
    MIN_TILE_SIDE,
    Neighbours,
    Pair,
    Pairs,
    Window,
    fold,
    images_of,
    rows_of,
    subsample,
    tile_shape,
    tiles_of,
)
from spark_me.sparse.pyramid import Pyramid


def multiply(rows: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Rows [n, Cin] by the transposes of the groups' matrices [Cout, Cin/groups] → [n, Cout]."""
    if groups == 1:
        return functional.linear(rows, matrix)
    if _one_each(matrix, groups):
        return rows * matrix.flatten()
    return _joined(torch.bmm(_by_group(rows, groups), _split(matrix, groups).mT))


def multiply_transposed(rows: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Rows [n, Cout] by the groups' matrices [Cout, Cin/groups] → [n, Cin]."""
    if groups == 1:
        return rows @ matrix
    if _one_each(matrix, groups):
        return rows * matrix.flatten()
    return _joined(torch.bmm(_by_group(rows, groups), _split(matrix, groups)))


def multiply_rows(x: Tensor, y: Tensor, groups: int, out: Tensor) -> None:
    """Transpose of x [n, Cout] by y [n, Cin] in every group, written to `out` [Cout, Cin/groups]."""
    if groups == 1:
        torch.mm(x.t(), y, out=out)
    elif _one_each(out, groups):
        out.copy_((x * y).sum(dim=0)[:, None])
    else:
        out.copy_(torch.bmm(_by_group(x, groups).mT, _by_group(y, groups)).flatten(0, 1))


def _one_each(matrix: Tensor, groups: int) -> bool:
    """Whether every channel is a group of its own."""
    return matrix.shape == (groups, 1)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[n, C] → [groups, n, C/groups]."""
    return x.view(x.shape[0], groups, -1).transpose(0, 1)


def _split(matrix: Tensor, groups: int) -> Tensor:
    """[Cout, Cin/groups] → [groups, Cout/groups, Cin/groups]."""
    return matrix.unflatten(0, (groups, -1))


def _joined(x: Tensor) -> Tensor:
    """[groups, n, C/groups] → [n, C]."""
    return x.transpose(0, 1).flatten(1)


def convolution(rows: Tensor, weight: Tensor, window: Window, neighbours: Neighbours, groups: int = 1) -> Tensor:
    """Sparse convolution of rows [N_in, Cin] → [N_out, Cout].

    Args:
        rows: features at `window.in_stride`, canonical order; they say in which dtype to compute.
        weight: [Cout, Cin/groups, kh, kw].
        window: kernel size, strides and dilation.
        neighbours: the pyramid's tables.
        groups: in how many groups the channels fall, as in `torch.nn.Conv2d`.
    """
    if window.volume == 1 and window.before == (0, 0):
        if window.stride > 1:
            rows = subsample(rows, window.stride, neighbours.side(window.in_stride))
        return multiply(rows, weight.flatten(1).to(rows.dtype), groups)  # a view, whose gradient is one, too
    if window.span == (window.stride, window.stride) and window.before == (0, 0) and groups == 1:
        return _patchify(rows, weight.to(rows.dtype), window, neighbours)
    if groups == 1 and autotune.is_open(rows):
        geometry = (window.in_stride, *window.size, window.stride, *window.dilation, *window.before)
        algorithms = _algorithms(rows, weight, window, neighbours)
        return autotune.CHOICES.run("convolution", (*geometry, neighbours.patch_size), algorithms, rows, weight)
    # On a GPU, groups stay with tiles: finding pairs would wait for it.
    if neighbours.side(window.out_stride) >= MIN_TILE_SIDE or rows.is_cuda:
        return _TileConvolution.apply(rows, weight, window, neighbours, groups)
    return _PairConvolution.apply(rows, weight, neighbours.pairs(window), neighbours.sites(window.out_stride), groups)


def convolution_to_raster(rows: Tensor, weight: Tensor, stride: int, pyramid: Pyramid) -> Tensor:
    """Sparse convolution with an output at every place of the dense map: [N, Cin] → [B·h·w, Cout].

    Args:
        rows: features at `stride`, canonical order; they say in which dtype to compute.
        weight: [Cout, Cin, k, k], k odd: the kernel is centred and of stride 1.
        stride: tensor stride of rows and map.
        pyramid: that the rows lie on.
    """
    if autotune.is_open(rows):
        geometry = (stride, weight.shape[-1], pyramid.patch_size)
        algorithms = _algorithms_to_raster(rows, weight, stride, pyramid)
        return autotune.CHOICES.run("convolution to dense", geometry, algorithms, rows, weight)
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
        outside = neighbours.outside_of_tiles(window.in_stride, (-top, -left), shape)
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


def _algorithms(rows: Tensor, weight: Tensor, window: Window, neighbours: Neighbours) -> autotune.Algorithms:
    def tiles(rows: Tensor, weight: Tensor) -> Tensor:
        return _TileConvolution.apply(rows, weight, window, neighbours, 1)

    def pairs(rows: Tensor, weight: Tensor) -> Tensor:
        return _PairConvolution.apply(rows, weight, neighbours.pairs(window), neighbours.sites(window.out_stride), 1)

    if not autotune.kernels_run_on(weight.device):
        return {"tiles": tiles, "pairs": pairs}
    table, transposed = partial(neighbours.inputs_of_outputs, window), partial(neighbours.outputs_of_inputs, window)
    return {**_implicit_gemms(rows, weight, table, transposed), "tiles": tiles}


def _algorithms_to_raster(rows: Tensor, weight: Tensor, stride: int, pyramid: Pyramid) -> autotune.Algorithms:
    size = weight.shape[-1]

    def dense(rows: Tensor, weight: Tensor) -> Tensor:
        return rows_of(functional.conv2d(pyramid.raster(rows, stride), weight.to(rows.dtype), padding=size // 2))

    def pairs(rows: Tensor, weight: Tensor) -> Tensor:
        return _pairs_to_raster(rows, weight, stride, pyramid)

    if not autotune.kernels_run_on(weight.device):
        return {"dense": dense, "pairs": pairs}
    table = partial(pyramid.neighbours.inputs_of_places, stride, size)
    transposed = partial(pyramid.neighbours.places_of_inputs, stride, size)
    return {**_implicit_gemms(rows, weight, table, transposed), "dense": dense}


def _implicit_gemms(
    rows: Tensor, weight: Tensor, table: Callable[[], Tensor], transposed: Callable[[], Tensor]
) -> dict[str, Callable[..., Tensor]]:
    from spark_me.sparse.kernels import implicit_gemm  # Triton is imported where it is used

    def cut(blocks: implicit_gemm.Blocks) -> Callable[..., Tensor]:
        return lambda rows, weight: implicit_gemm.convolution(
            rows, weight_to_kernel(weight), table(), transposed, blocks
        )

    out_channels, in_channels = weight.shape[:2]
    choices = implicit_gemm.block_choices(rows.dtype, in_channels, out_channels, weight.device)
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
        weight = weight.to(rows.dtype, memory_format=torch.channels_last)
        return rows_of(functional.conv2d(tiles, weight, None, window.stride, 0, window.dilation, groups))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        window, neighbours = ctx.window, ctx.neighbours
        weight = weight.to(rows.dtype, memory_format=torch.channels_last)
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
        weight = weight.to(rows.dtype)
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
