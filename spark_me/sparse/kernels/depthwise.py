"""Depthwise convolution that gathers its neighbours by a table, in Triton: nothing is laid out.

A program computes a block of rows for a block of channels. The input gradient is the same with the kernel turned round.
The kernel gradient is summed over one part of the sites at a time; the parts are added afterwards in a fixed order: no
atomics, so that runs repeat bit by bit. Sums are float32 in every dtype.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCKS = {"64": 64, "32": 32}
"""Sensible numbers of rows for a program, by name. 64 is a patch of 8×8 sites; fewer leave room for more programs."""
GRADIENT_ROWS = 16
"""Sites whose products a program of the kernel gradient holds, for a column of the kernel."""
PROGRAMS = 2048
"""Programs that the kernel gradient is cut into at most; a constant, so that every GPU adds in the same order."""
MIN_STEPS = 16
"""Blocks of sites that a part of the kernel gradient has at least."""


def convolution(rows: Tensor, kernel: Tensor, bias: Tensor, table: Tensor, block: int) -> Tensor:
    """Depthwise convolution of stride 1, odd and centred: rows [N, C] → [N, C], in float32, bfloat16 or float16.

    Args:
        rows: features.
        kernel: [K, C], in float32 or the same dtype.
        bias: [C], as the kernel; the gradients of both are summed in float32 and handed on in their own dtypes.
        table: int32 [K, N], the row under each kernel offset of each site; N where there is none.
        block: one of `BLOCKS`.
    """
    return _Convolution.apply(rows, kernel, bias, table, block)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, bias: Tensor, table: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.table, ctx.block, ctx.bias_dtype = table, block, bias.dtype
        return _convolve(rows, kernel, bias, table, block)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, kernel = ctx.saved_tensors
        grad_rows = grad_kernel = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = _convolve(gradient, kernel.flip(0), None, ctx.table, ctx.block)
        if ctx.needs_input_grad[1]:
            grad_kernel = _correlate(rows, gradient, ctx.table).to(kernel.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = gradient.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_rows, grad_kernel, grad_bias, None, None


def _convolve(rows: Tensor, kernel: Tensor, bias: Tensor | None, table: Tensor, block_rows: int) -> Tensor:
    rows, kernel = rows.contiguous(), kernel.contiguous()
    sites, channels = rows.shape
    out, block = torch.empty_like(rows), _channel_block(channels)
    grid = (triton.cdiv(sites, block_rows) * triton.cdiv(channels, block),)
    with torch.cuda.device_of(rows):
        _convolve_kernel[grid](
            rows, kernel, bias, table, out, sites, channels,
            SIZE=_size(table), ROWS=block_rows, CHANNELS=block, num_warps=4,
        )  # fmt: skip
    return out


def _correlate(rows: Tensor, gradient: Tensor, table: Tensor) -> Tensor:
    """The kernel's gradient [K, C], in float32, from rows [N, C] and the outputs' gradient [N, C]."""
    rows, gradient = rows.contiguous(), gradient.contiguous()
    (sites, channels), size = rows.shape, _size(table)
    block = _channel_block(channels)
    tiles = size * triton.cdiv(channels, block)
    # A power of two, so that few kernels are compiled.
    steps = max(MIN_STEPS, triton.cdiv(sites, GRADIENT_ROWS * max(1, PROGRAMS // tiles)))
    steps = triton.next_power_of_2(min(steps, triton.cdiv(sites, GRADIENT_ROWS)))
    parts = triton.cdiv(sites, steps * GRADIENT_ROWS)
    sums = torch.empty(parts, size**2, channels, dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):
        _correlate_kernel[tiles, parts](
            rows, gradient, table, sums, sites, channels,
            STEPS=steps, SIZE=size, COLUMN=triton.next_power_of_2(size), ROWS=GRADIENT_ROWS, CHANNELS=block,
            num_warps=4,
        )  # fmt: skip
    return sums.sum(dim=0)


def _size(table: Tensor) -> int:
    return round(len(table) ** 0.5)


def _channel_block(channels: int) -> int:
    return 64 if channels % 64 == 0 else 32


@triton.jit
def _convolve_kernel(
    rows: tl.tensor, kernel: tl.tensor, bias: tl.tensor | None, table: tl.tensor, out: tl.tensor, sites: tl.tensor,
    channels: tl.tensor,
    SIZE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    channel_blocks = tl.cdiv(channels, CHANNELS)
    place = tl.program_id(0) // channel_blocks * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    neighbours, weights = table + place, kernel + channel
    for _ in range(SIZE):
        # Unrolled, so that the loads of a column of the kernel are in flight together.
        for _ in tl.static_range(SIZE):
            row = tl.load(neighbours, mask=place < sites, other=sites)
            x = tl.load(
                rows + row.to(tl.int64)[:, None] * channels + channel[None, :],
                mask=(row < sites)[:, None] & real[None, :],
                other=0.0,
            )
            total += x.to(tl.float32) * tl.load(weights, mask=real, other=0.0).to(tl.float32)[None, :]
            neighbours += sites
            weights += channels
    tl.store(
        out + place.to(tl.int64)[:, None] * channels + channel[None, :],
        total.to(out.dtype.element_ty),
        mask=(place < sites)[:, None] & real[None, :],
    )


@triton.jit
def _correlate_kernel(
    rows: tl.tensor, gradient: tl.tensor, table: tl.tensor, sums: tl.tensor, sites: tl.tensor, channels: tl.tensor,
    STEPS: tl.constexpr, SIZE: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    # The programs of one part run side by side: they read the same rows, from L2.
    down = tl.arange(0, COLUMN)
    offset = tl.program_id(0) % SIZE * SIZE + down
    channel = tl.program_id(0) // SIZE * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    real = channel < channels
    products = tl.zeros((COLUMN, ROWS, CHANNELS), dtype=tl.float32)
    for step in range(STEPS):
        place = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        row = tl.load(
            table + offset.to(tl.int64)[:, None] * sites + place[None, :],
            mask=(down < SIZE)[:, None] & (place < sites)[None, :],
            other=sites,
        )
        x = tl.load(
            rows + row.to(tl.int64)[:, :, None] * channels + channel[None, None, :],
            mask=(row < sites)[:, :, None] & real[None, None, :],
            other=0.0,
        )
        upstream = tl.load(
            gradient + place.to(tl.int64)[:, None] * channels + channel[None, :],
            mask=(place < sites)[:, None] & real[None, :],
            other=0.0,
        )
        products += x.to(tl.float32) * upstream.to(tl.float32)[None, :, :]
    tl.store(
        sums + (part * SIZE * SIZE + offset).to(tl.int64)[:, None] * channels + channel[None, :],
        tl.sum(products, axis=1),
        mask=(down < SIZE)[:, None] & real[None, :],
    )
