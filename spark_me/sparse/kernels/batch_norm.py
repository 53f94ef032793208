"""Triton kernels of batch normalisation over rows [N, C], with stochastic depth, a residual sum and ReLU in one pass.

Tensors are contiguous, sums are in float32 at least. A reduction over the rows has two stages: each program reduces its
part of the rows, then the parts are reduced, both in a fixed order. So results are reproducible bit by bit. Processes
that synchronise exchange what there is between the stages, once in each direction.

The moments of some rows are three values a channel, [3, C]: number, mean, and sum of squared deviations from it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable


@triton.jit
def load(values: tl.tensor, place: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Values in float32, zero where the mask is false."""
    return tl.load(values + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _places(
    start: tl.tensor, end: tl.tensor, channel: tl.tensor, channels: tl.tensor, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Rows [ROWS, 1] from `start`; where their channels lie in memory, and which of these there are before `end`."""
    row = start + tl.arange(0, ROWS)[:, None]
    mask = (row < end) & (channel < channels)
    return row, row.to(tl.int64) * channels + channel, mask


@triton.jit
def _of_channels(values: tl.tensor, channel: tl.tensor, channels: tl.tensor) -> tl.tensor:
    """The values [C] of the channels of a tile, in float32."""
    return load(values, channel, channel < channels)


@triton.jit
def _place_of_program(channels: tl.tensor, CHANNELS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Its number down the rows, and its channels: programs that follow each other read memory in order."""
    columns = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % columns * CHANNELS + tl.arange(0, CHANNELS)
    return tl.program_id(0) // columns, channel[None, :]


@triton.jit
def moments_of_parts(
    x: tl.tensor, moments: tl.tensor, rows: tl.tensor, channels: tl.tensor, rows_of_part: tl.tensor,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Moments of each part's rows [N, C]: [parts, 3, C].

    Every element of the tile follows the rows that it sees by Welford's method, then the tile's rows are combined: all
    relative to the part's first row, so that nothing cancels where the mean is far above the deviation.
    """
    part, channel = _place_of_program(channels, CHANNELS)
    start = part * rows_of_part
    end = tl.minimum(start + rows_of_part, rows)
    origin = _of_channels(x + start.to(tl.int64) * channels, channel, channels)
    count = tl.zeros([ROWS, 1], tl.float32)
    mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    square = tl.zeros([ROWS, CHANNELS], tl.float32)
    while start < end:
        row, place, mask = _places(start, end, channel, channels, ROWS)
        present = (row < end).to(tl.float32)
        value = load(x, place, mask)
        count += present
        share = present / tl.maximum(count, 1.0)
        deviation = value - origin - mean
        mean += deviation * share
        square += deviation * deviation * (present - share)
        start += ROWS
    total = tl.sum(count, axis=0)[None, :]
    mean_of_part = tl.sum(mean * count, axis=0)[None, :] / total
    deviation = mean - mean_of_part
    square_of_part = tl.sum(square + count * deviation * deviation, axis=0)[None, :]
    _store_moments(moments + part * 3 * channels, total, origin + mean_of_part, square_of_part, channel, channels)


@triton.jit
def _store_moments(
    moments: tl.tensor, count: tl.tensor, mean: tl.tensor, square: tl.tensor, channel: tl.tensor, channels: tl.tensor
) -> None:
    known = channel < channels
    tl.store(moments + channel, count, mask=known)
    tl.store(moments + channels + channel, mean, mask=known)
    tl.store(moments + 2 * channels + channel, square, mask=known)


@triton.jit
def _combined_moments(
    moments: tl.tensor, channel: tl.tensor, channels: tl.tensor, parts: tl.tensor, PARTS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The moments of all rows from those of their parts [parts, 3, C], of which none is empty."""
    part = tl.arange(0, PARTS)[:, None]
    place = part * 3 * channels + channel
    mask = (part < parts) & (channel < channels)
    count = tl.load(moments + part * 3 * channels, mask=part < parts, other=0.0)  # the same of all channels
    # Sums relative to the first part's mean do not cancel.
    origin = _of_channels(moments + channels, channel, channels)
    from_origin = tl.load(moments + channels + place, mask=mask, other=0.0) - origin
    total = tl.sum(count, axis=0)[None, :]
    mean = tl.sum(from_origin * count, axis=0)[None, :] / total
    deviation = from_origin - mean
    square = tl.load(moments + 2 * channels + place, mask=mask, other=0.0) + deviation * deviation * count
    return total, origin + mean, tl.sum(square, axis=0)[None, :]


@triton.jit
def combine_moments(
    moments: tl.tensor, out: tl.tensor, channels: tl.tensor, parts: tl.tensor,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """The moments [3, C] of all rows from those of their parts [parts, 3, C]."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    count, mean, square = _combined_moments(moments, channel, channels, parts, PARTS)
    _store_moments(out, count, mean, square, channel, channels)


@triton.jit
def statistics(
    moments: tl.tensor, mean_out: tl.tensor, rstd_out: tl.tensor, running_mean: tl.tensor, running_variance: tl.tensor,
    channels: tl.tensor, parts: tl.tensor, eps: tl.tensor, momentum: tl.tensor,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Mean and 1 / deviation [C] from the moments of the parts; moves the running statistics where given."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    count, mean, square = _combined_moments(moments, channel, channels, parts, PARTS)
    tl.store(mean_out + channel, mean, mask=known)
    tl.store(rstd_out + channel, tl.rsqrt(square / count + eps), mask=known)
    if running_mean is not None:
        old = _of_channels(running_mean, channel, channels)
        tl.store(running_mean + channel, old * (1 - momentum) + mean * momentum, mask=known)
        old = _of_channels(running_variance, channel, channels)
        unbiased = square / (count - 1)
        tl.store(running_variance + channel, old * (1 - momentum) + unbiased * momentum, mask=known)


@triton.jit
def normalise(
    x: tl.tensor, shortcut: tl.tensor, scale: tl.tensor, out: tl.tensor, mean: tl.tensor, rstd: tl.tensor,
    weight: tl.tensor, bias: tl.tensor, rows: tl.tensor, channels: tl.tensor,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """relu(((x − mean)·rstd·weight + bias)·scale + shortcut); `scale` [N] and `shortcut` [N, C] may be None."""
    block, channel = _place_of_program(channels, CHANNELS)
    row, place, mask = _places(block * ROWS, rows, channel, channels, ROWS)
    value = load(x, place, mask)
    value = (value - _of_channels(mean, channel, channels)) * _of_channels(rstd, channel, channels)
    value = value * _of_channels(weight, channel, channels) + _of_channels(bias, channel, channels)
    if scale is not None:
        value *= load(scale, row, row < rows)
    if shortcut is not None:
        value += load(shortcut, place, mask)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # keeps NaN, where a maximum would hide it
    tl.store(out + place, value, mask=mask)


@triton.jit
def gradient_sums_of_parts(
    x: tl.tensor, gradient: tl.tensor, out: tl.tensor, rectified: tl.tensor, scale: tl.tensor, mean: tl.tensor,
    rstd: tl.tensor, weight: tl.tensor, bias: tl.tensor, sums: tl.tensor, products: tl.tensor, rows: tl.tensor,
    channels: tl.tensor, rows_of_part: tl.tensor,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Sums over each part's rows of the gradient g of the affine output, and of g·x̂: two [parts, C].

    What ReLU let pass is read from `out`, and the gradient before it is written to `rectified`; where `out` is None,
    it is computed again from `x`.
    """
    part, channel = _place_of_program(channels, CHANNELS)
    start = part * rows_of_part
    end = tl.minimum(start + rows_of_part, rows)
    means, rstds = _of_channels(mean, channel, channels), _of_channels(rstd, channel, channels)
    weights, biases = _of_channels(weight, channel, channels), _of_channels(bias, channel, channels)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    while start < end:
        row, place, mask = _places(start, end, channel, channels, ROWS)
        normalised = (load(x, place, mask) - means) * rstds
        passed = load(gradient, place, mask)
        if RELU:
            if out is None:
                passed = tl.where(normalised * weights + biases <= 0, 0.0, passed)
            else:
                passed = tl.where(tl.load(out + place, mask=mask, other=0.0) <= 0, 0.0, passed)
                tl.store(rectified + place, passed, mask=mask)
        if scale is not None:
            passed *= load(scale, row, row < end)
        total += passed
        product += passed * normalised
        start += ROWS
    place_of_part = part * channels + channel
    tl.store(sums + place_of_part, tl.sum(total, axis=0)[None, :], mask=channel < channels)
    tl.store(products + place_of_part, tl.sum(product, axis=0)[None, :], mask=channel < channels)


@triton.jit
def input_gradient(
    x: tl.tensor, gradient: tl.tensor, scale: tl.tensor, mean: tl.tensor, rstd: tl.tensor, weight: tl.tensor,
    bias: tl.tensor, mean_gradient: tl.tensor, mean_product: tl.tensor, grad_x: tl.tensor, rows: tl.tensor,
    channels: tl.tensor,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """weight·rstd·(g − mean of g − x̂·mean of g·x̂), or weight·rstd·g where the means [C] are None."""
    block, channel = _place_of_program(channels, CHANNELS)
    row, place, mask = _places(block * ROWS, rows, channel, channels, ROWS)
    rstds, weights = _of_channels(rstd, channel, channels), _of_channels(weight, channel, channels)
    value = load(x, place, mask)
    normalised = (value - _of_channels(mean, channel, channels)) * rstds
    passed = load(gradient, place, mask)
    if RELU:
        passed = tl.where(normalised * weights + _of_channels(bias, channel, channels) <= 0, 0.0, passed)
    if scale is not None:
        passed *= load(scale, row, row < rows)
    if mean_gradient is not None:
        passed -= _of_channels(mean_gradient, channel, channels)
        passed -= normalised * _of_channels(mean_product, channel, channels)
    tl.store(grad_x + place, passed * rstds * weights, mask=mask)


TILE = 2048
"""Features that a program holds at once."""
PROGRAMS = 640
"""How many programs share a reduction: five for each multiprocessor of a large GPU, which runs them at one time."""
STATISTICS_WIDTH = 8
"""Channels of a program that combines the parts' statistics, all parts at once."""


def fused_batch_norm(
    norm: nn.BatchNorm2d,
    rows: Tensor,
    shortcut: Tensor | None,
    scale: Tensor | None,
    relu: bool,
    *,
    synchronise: bool = False,
) -> Tensor:
    """relu(norm(rows)·scale + shortcut), the last three where given; moves running statistics as `norm(rows)` does.

    For the backward pass it keeps `rows`, and the output where both `shortcut` and `relu` are given.

    Args:
        norm: parameters, running statistics and mode.
        rows: [N, C], float32 or half precision; statistics are float32.
        shortcut: [N, C].
        scale: [N], not negative.
        relu: whether negative results become zero.
        synchronise: take the statistics of the batch over the rows of all processes, each of which has one at least.

    Raises:
        ValueError: if statistics are to be taken of a single row, as there are no running ones.
    """
    rows = rows.contiguous()
    shortcut = None if shortcut is None else shortcut.contiguous()
    weight, bias = norm.weight, norm.bias
    if weight is None:
        weight, bias = rows.new_ones(rows.shape[1]), rows.new_zeros(rows.shape[1])
    # As `BatchNorm2d` says; processes that synchronise have two rows at least.
    single = len(rows) == 1 and norm.running_mean is not None and not synchronise
    of_batch = not single and (norm.training or norm.running_mean is None)
    # the device of the kernels is the current one, not that of their tensors
    with torch.cuda.device_of(rows):
        mean, rstd, count = _batch_statistics(norm, rows, synchronise) if of_batch else _running_statistics(norm)
        return _FusedBatchNorm.apply(rows, shortcut, weight, bias, scale, mean, rstd, count, relu, synchronise)


def _batch_statistics(norm: nn.BatchNorm2d, rows: Tensor, synchronise: bool) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean and 1 / deviation of the rows, float32 [C], and their number; moves the running statistics.

    Of the rows of all processes the number, which a host does not know, is a tensor [].
    """
    number, channels = rows.shape
    if number == 1 and not synchronise:
        raise ValueError(f"batch normalisation needs more than one site to train, not features [1, {channels}]")
    tracks = norm.training and norm.track_running_stats and norm.running_mean is not None
    momentum = _count_batch(norm) if norm.training and norm.track_running_stats else 0.0
    height, width = _tile(channels)
    rows_of_part, parts = _parts(number, channels)
    moments = rows.new_empty(parts, 3, channels, dtype=torch.float32)
    grid = (parts * triton.cdiv(channels, width),)
    moments_of_parts[grid](rows.detach(), moments, number, channels, rows_of_part, height, width)
    if synchronise:
        moments = _moments_of_processes(moments)
    mean, rstd = rows.new_empty(2, channels, dtype=torch.float32)
    running = (norm.running_mean, norm.running_var) if tracks else (None, None)
    statistics[(triton.cdiv(channels, STATISTICS_WIDTH),)](
        moments, mean, rstd, *running, channels, len(moments), norm.eps, momentum,
        triton.next_power_of_2(len(moments)), STATISTICS_WIDTH, num_warps=8,
    )  # fmt: skip
    return mean, rstd, moments[:, 0, 0].sum() if synchronise else number


def _moments_of_processes(moments: Tensor) -> Tensor:
    """The moments [processes, 3, C] of all rows of each process, from those of this one's parts [parts, 3, C]."""
    parts, _, channels = moments.shape
    own = moments.new_empty(3, channels)
    combine_moments[(triton.cdiv(channels, STATISTICS_WIDTH),)](
        moments, own, channels, parts, triton.next_power_of_2(parts), STATISTICS_WIDTH, num_warps=8
    )
    gathered = moments.new_empty(distributed.get_world_size(), 3, channels)
    distributed.all_gather_into_tensor(gathered.flatten(0, 1), own)
    return gathered


def _running_statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, None]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean.float(), torch.rsqrt(norm.running_var.float() + norm.eps), None


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
        ctx: Any, rows: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None,
        mean: Tensor, rstd: Tensor, count: int | Tensor | None, relu: bool, synchronise: bool,
    ) -> Tensor:  # fmt: skip
        number, channels = rows.shape
        height, width = _tile(channels)
        dtype = rows.dtype if shortcut is None else torch.promote_types(rows.dtype, shortcut.dtype)
        out = torch.empty_like(rows, dtype=dtype)
        grid = (triton.cdiv(number, height) * triton.cdiv(channels, width),)
        normalise[grid](rows, shortcut, scale, out, mean, rstd, weight, bias, number, channels, relu, height, width)
        # Without a shortcut, what ReLU let pass is found again from the rows: less to read than the output.
        kept = out if relu and shortcut is not None else None
        ctx.save_for_backward(rows, weight, bias, scale, mean, rstd, kept)
        ctx.count, ctx.relu, ctx.synchronise, ctx.has_shortcut = count, relu, synchronise, shortcut is not None
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
        gradient_sums_of_parts[(parts * columns,)](
            rows, gradient, out, rectified, *factors, *of_parts, number, channels, rows_of_part,
            ctx.relu, height, width,
        )  # fmt: skip
        if rectified is not None:
            gradient = rectified
        sums = of_parts.sum(dim=1)
        # Each process has the gradients of its own rows' parameters, which are added up with those of all layers.
        grad_bias, grad_weight = sums.to(weight.dtype)
        means = (None, None) if ctx.count is None else _mean_gradients(sums, ctx.count, ctx.synchronise)
        grad_rows = torch.empty_like(rows)
        recompute = ctx.relu and out is None
        input_gradient[(triton.cdiv(number, height) * columns,)](
            rows, gradient, *factors, *means, grad_rows, number, channels, recompute, height, width
        )
        grad_shortcut = gradient if ctx.has_shortcut else None
        return grad_rows, grad_shortcut, grad_weight, grad_bias, *[None] * 6


def _mean_gradients(sums: Tensor, count: int | Tensor, synchronise: bool) -> Tensor:
    """Means [2, C] over all rows, of all processes where they synchronise, from this one's sums."""
    if synchronise:
        sums = sums.clone()  # they are this process's gradients of weight and bias, too
        distributed.all_reduce(sums)
    return sums / count
