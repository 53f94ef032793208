"""Triton kernels of GELU followed by a global response norm, over the rows [N, C] of a batch of images.

An image's rows lie side by side: those of image b are `first_rows[b]` to `first_rows[b + 1]`. The programs [columns, B,
parts] take some channels, and one of `parts` equal parts, of the rows of an image. Arithmetic and sums are in float32,
the latter in a fixed order. GELU is exact, and computed again wherever it is needed rather than read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark_me.sparse.kernels.batch_norm import load
from spark_me.sparse.norms import gradients_of_scale, scale_of_images


@triton.jit
def _part_of_image(
    first_rows: tl.tensor, parts: tl.tensor, CHANNELS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The first row of this program, the one after its last, and its channels."""
    first = tl.load(first_rows + tl.program_id(1))
    end = tl.load(first_rows + tl.program_id(1) + 1)
    rows_of_part = tl.cdiv(end - first, parts)
    start = first + tl.program_id(2) * rows_of_part
    end = tl.minimum(start + rows_of_part, end)
    return start, end, tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]


@triton.jit
def _normal_distribution(x: tl.tensor) -> tl.tensor:
    """Φ(x), so that GELU is x·Φ(x)."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def squares_of_parts(
    x: tl.tensor, first_rows: tl.tensor, squares: tl.tensor, channels: tl.tensor, parts: tl.tensor,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Sums of gelu(x)² over the rows of each part: [B, parts, C]."""
    start, end, channel = _part_of_image(first_rows, parts, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    while start < end:
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (channel < channels)
        value = load(x + row * channels, channel, mask)
        activated = value * _normal_distribution(value)
        total += activated * activated
        start += ROWS
    place = (tl.program_id(1) * parts + tl.program_id(2)) * channels + channel
    tl.store(squares + place, tl.sum(total, axis=0)[None, :], mask=channel < channels)


@triton.jit
def respond(
    x: tl.tensor, first_rows: tl.tensor, scale: tl.tensor, beta: tl.tensor, out: tl.tensor, channels: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """gelu(x)·scale + beta, with `scale` [B, C] float32."""
    start, end, channel = _part_of_image(first_rows, parts, CHANNELS)
    scales = tl.load(scale + tl.program_id(1) * channels + channel, mask=channel < channels, other=0.0)
    betas = load(beta, channel, channel < channels)
    while start < end:
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (channel < channels)
        value = load(x + row * channels, channel, mask)
        tl.store(out + row * channels + channel, value * _normal_distribution(value) * scales + betas, mask=mask)
        start += ROWS


@triton.jit
def gradient_sums_of_parts(
    x: tl.tensor, gradient: tl.tensor, first_rows: tl.tensor, sums: tl.tensor, products: tl.tensor,
    channels: tl.tensor, parts: tl.tensor,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Sums of the output's gradient g, and of g·gelu(x), over the rows of each part: two [B, parts, C]."""
    start, end, channel = _part_of_image(first_rows, parts, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    while start < end:
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (channel < channels)
        value = load(x + row * channels, channel, mask)
        upstream = load(gradient + row * channels, channel, mask)
        total += upstream
        product += upstream * value * _normal_distribution(value)
        start += ROWS
    place = (tl.program_id(1) * parts + tl.program_id(2)) * channels + channel
    tl.store(sums + place, tl.sum(total, axis=0)[None, :], mask=channel < channels)
    tl.store(products + place, tl.sum(product, axis=0)[None, :], mask=channel < channels)


@triton.jit
def input_gradient(
    x: tl.tensor, gradient: tl.tensor, first_rows: tl.tensor, scale: tl.tensor, pull: tl.tensor, grad_x: tl.tensor,
    channels: tl.tensor, parts: tl.tensor,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """(g·scale + gelu(x)·pull)·gelu′(x), with `scale` and `pull` [B, C] float32."""
    start, end, channel = _part_of_image(first_rows, parts, CHANNELS)
    of_image = tl.program_id(1) * channels + channel
    scales = tl.load(scale + of_image, mask=channel < channels, other=0.0)
    pulls = tl.load(pull + of_image, mask=channel < channels, other=0.0)
    while start < end:
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (channel < channels)
        value = load(x + row * channels, channel, mask)
        upstream = load(gradient + row * channels, channel, mask)
        distribution = _normal_distribution(value)
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        grad_activated = upstream * scales + value * distribution * pulls
        slope = distribution + value * density
        tl.store(grad_x + row * channels + channel, grad_activated * slope, mask=mask)
        start += ROWS


TILE = 2048
"""Features that a program holds at once."""
PROGRAMS = 1024
"""How many programs share the rows at least: images in few are cut into parts."""


def fused_gelu_response_norm(rows: Tensor, gamma: Tensor, beta: Tensor, first_rows: Tensor) -> Tensor:
    """The global response norm of gelu(rows); only `rows` is kept for the backward pass.

    Args:
        rows: [N, C], float32 or half precision; statistics are float32.
        gamma: [C].
        beta: [C].
        first_rows: int64 [B + 1], where each image's rows begin, and N.
    """
    # the device of the kernels is the current one, not that of their tensors
    with torch.cuda.device_of(rows):
        return _GeluResponseNorm.apply(rows.contiguous(), gamma, beta, first_rows)


class _GeluResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gamma: Tensor, beta: Tensor, first_rows: Tensor) -> Tensor:
        images, channels = len(first_rows) - 1, rows.shape[1]
        grid, sizes = _partition(images, channels)
        squares = rows.new_empty(images, grid[2], channels, dtype=torch.float32)
        squares_of_parts[grid](rows, first_rows, squares, *sizes)
        norm = squares.sum(dim=1).sqrt()
        out = torch.empty_like(rows)
        respond[grid](rows, first_rows, scale_of_images(norm, gamma), beta, out, *sizes)
        ctx.save_for_backward(rows, gamma, norm, first_rows)
        ctx.beta_dtype = beta.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, gamma, norm, first_rows = ctx.saved_tensors
        images, channels = norm.shape
        grid, sizes = _partition(images, channels)
        gradient = gradient.contiguous()
        of_parts = rows.new_empty(2, images, grid[2], channels, dtype=torch.float32)
        gradient_sums_of_parts[grid](rows, gradient, first_rows, *of_parts, *sizes)
        sums, grad_scale = of_parts.sum(dim=2)
        pull, grad_gamma = gradients_of_scale(norm, gamma, grad_scale)
        scale = scale_of_images(norm, gamma)
        grad_rows = torch.empty_like(rows)
        input_gradient[grid](rows, gradient, first_rows, scale, pull, grad_rows, *sizes)
        return grad_rows, grad_gamma, sums.sum(dim=0).to(ctx.beta_dtype), None


def _partition(images: int, channels: int) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """The grid (columns of tiles, images, parts of an image), and (channels, parts, rows and channels of a tile)."""
    width = min(64, triton.next_power_of_2(channels))
    columns = triton.cdiv(channels, width)
    parts = triton.cdiv(PROGRAMS, images * columns)
    return (columns, images, parts), (channels, parts, TILE // width, width)
