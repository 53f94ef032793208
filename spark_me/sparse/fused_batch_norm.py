"""Batch normalisation of rows [N, C], with stochastic depth, a residual sum and ReLU, in Triton's kernels."""

from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark_me.sparse import batch_norm_kernels as kernels

TILE = 2048
"""Features that a program holds at once."""
PROGRAMS = 640
"""How many programs share a reduction: five for each multiprocessor of a large GPU, which runs them at one time."""
STATISTICS_WIDTH = 8
"""Channels of a program that combines the parts' statistics, all parts at once."""


def fused_batch_norm(
    norm: nn.BatchNorm2d, rows: Tensor, shortcut: Tensor | None, scale: Tensor | None, relu: bool
) -> Tensor:
    """relu(norm(rows)·scale + shortcut), the last three where given; moves running statistics as `norm(rows)` does.

    For the backward pass it keeps `rows`, and the output where both `shortcut` and `relu` are given.

    Args:
        norm: parameters, running statistics and mode.
        rows: [N, C], float32 or half precision; statistics are float32.
        shortcut: [N, C].
        scale: [N], not negative.
        relu: whether negative results become zero.

    Raises:
        ValueError: if statistics are to be taken of a single row, as there are no running ones.
    """
    rows = rows.contiguous()
    shortcut = None if shortcut is None else shortcut.contiguous()
    weight, bias = norm.weight, norm.bias
    if weight is None:
        weight, bias = rows.new_ones(rows.shape[1]), rows.new_zeros(rows.shape[1])
    single = len(rows) == 1 and norm.running_mean is not None  # as `BatchNorm` says
    of_batch = not single and (norm.training or norm.running_mean is None)
    # the device of the kernels is the current one, not that of their tensors
    with torch.cuda.device_of(rows):
        mean, rstd = _batch_statistics(norm, rows) if of_batch else _running_statistics(norm)
        return _FusedBatchNorm.apply(rows, shortcut, weight, bias, scale, mean, rstd, relu, of_batch)


def _batch_statistics(norm: nn.BatchNorm2d, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of the rows, float32 [C]; moves the running statistics."""
    number, channels = rows.shape
    if number == 1:
        raise ValueError(f"batch normalisation needs more than one site to train, not features [1, {channels}]")
    tracks = norm.training and norm.track_running_stats and norm.running_mean is not None
    momentum = _count_batch(norm) if norm.training and norm.track_running_stats else 0.0
    height, width = _tile(channels)
    rows_of_part, parts = _parts(number, channels)
    means, squares = rows.new_empty(2, parts, channels, dtype=torch.float32)
    mean, rstd = rows.new_empty(2, channels, dtype=torch.float32)
    grid = (parts * triton.cdiv(channels, width),)
    kernels.statistics_of_parts[grid](rows.detach(), means, squares, number, channels, rows_of_part, height, width)
    running = (norm.running_mean, norm.running_var) if tracks else (None, None)
    kernels.statistics[(triton.cdiv(channels, STATISTICS_WIDTH),)](
        means,
        squares,
        mean,
        rstd,
        *running,
        number,
        channels,
        rows_of_part,
        parts,
        norm.eps,
        momentum,
        triton.next_power_of_2(parts),
        STATISTICS_WIDTH,
        num_warps=8,
    )
    return mean, rstd


def _running_statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean.float(), torch.rsqrt(norm.running_var.float() + norm.eps)


def _count_batch(norm: nn.BatchNorm2d) -> float:
    """Count one more batch; how far the running statistics move towards its own: 1 / batches for momentum None."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1 / norm.num_batches_tracked.item()
    return 0.0 if norm.momentum is None else float(norm.momentum)


def _tile(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile; a row's channels fill a cache line of half precision."""
    width = min(64, triton.next_power_of_2(channels))
    return TILE // width, width


def _parts(rows: int, channels: int) -> tuple[int, int]:
    """(rows of a part, parts) of a reduction over the rows, in whole tiles."""
    height, width = _tile(channels)
    most = max(1, PROGRAMS // triton.cdiv(channels, width))
    rows_of_part = triton.cdiv(triton.cdiv(rows, most), height) * height
    return rows_of_part, triton.cdiv(rows, rows_of_part)


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        relu: bool,
        of_batch: bool,
    ) -> Tensor:
        number, channels = rows.shape
        height, width = _tile(channels)
        dtype = rows.dtype if shortcut is None else torch.promote_types(rows.dtype, shortcut.dtype)
        out = torch.empty_like(rows, dtype=dtype)
        grid = (triton.cdiv(number, height) * triton.cdiv(channels, width),)
        kernels.normalise[grid](
            rows, shortcut, scale, out, mean, rstd, weight, bias, number, channels, relu, height, width
        )
        # Without a shortcut, what ReLU let pass is found again from the rows: less to read than the output.
        kept = out if relu and shortcut is not None else None
        ctx.save_for_backward(rows, weight, bias, scale, mean, rstd, kept)
        ctx.relu, ctx.of_batch, ctx.has_shortcut = relu, of_batch, shortcut is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, scale, mean, rstd, out = ctx.saved_tensors
        number, channels = rows.shape
        height, width = _tile(channels)
        rows_of_part, parts = _parts(number, channels)
        columns = triton.cdiv(channels, width)
        gradient = gradient.contiguous()
        rectified = None if out is None else torch.empty_like(gradient)
        of_parts = rows.new_empty(2, parts, channels, dtype=torch.float32)
        factors = (scale, mean, rstd, weight, bias)
        kernels.gradient_sums_of_parts[(parts * columns,)](
            rows,
            gradient,
            out,
            rectified,
            *factors,
            *of_parts,
            number,
            channels,
            rows_of_part,
            ctx.relu,
            height,
            width,
        )
        if rectified is not None:
            gradient = rectified
        sums, products = of_parts.sum(dim=1)
        grad_rows = torch.empty_like(rows)
        means = (sums, products) if ctx.of_batch else (None, None)
        recompute = ctx.relu and out is None
        kernels.input_gradient[(triton.cdiv(number, height) * columns,)](
            rows, gradient, *factors, *means, grad_rows, number, channels, recompute, height, width
        )
        grad_shortcut = gradient if ctx.has_shortcut else None
        return grad_rows, grad_shortcut, products.to(weight.dtype), sums.to(bias.dtype), None, None, None, None, None
