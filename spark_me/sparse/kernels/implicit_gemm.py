"""Sparse convolution as one matrix product that gathers its operand by itself (implicit GEMM), in Triton.

The rows under a kernel offset are read where they lie, by a neighbour table, straight into the tensor cores' tiles: no
[N, K·C] buffer is written. The input gradient is the same kernel on the transposed table with transposed matrices. The
kernel gradient multiplies the rows of one part of the sites at a time; the parts are added afterwards in a fixed order:
no atomics, so that runs repeat bit by bit. Sums are float32 in every dtype.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PROGRAMS = 1024
"""Programs that a kernel gradient is cut into at most; a constant, so that every GPU adds in the same order."""
MIN_STEPS = 16
"""Blocks of rows that a part of the kernel gradient has at least."""
MIN_EDGE = 16
"""The shortest edge of a block that tensor cores multiply."""


class Blocks(NamedTuple):
    """How the work is cut: a program computes `rows` × `columns` outputs, `depth` products of each at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Of the pipeline: the table's loads and those of what it points to are half of them ahead each."""


_HALF = (Blocks(64, 64, 64, 4, 5), Blocks(128, 128, 64, 8, 5), Blocks(128, 256, 64, 8, 5))
_TF32 = (Blocks(64, 64, 32, 4, 5), Blocks(128, 128, 32, 8, 5))
_FLOAT32 = (Blocks(64, 64, 16, 4, 2),)


def block_choices(dtype: torch.dtype, in_channels: int, out_channels: int, device: torch.device) -> dict[str, Blocks]:
    """The sensible ways to cut a convolution, by name ("128x256"), that the device has shared memory for."""
    sets = _HALF if dtype.itemsize == 2 else _TF32 if _precision() == "tf32" else _FLOAT32
    choices: dict[str, Blocks] = {}
    for blocks in sets:
        columns = _edge(max(in_channels, out_channels), blocks.columns)
        step = (blocks.rows + columns) * blocks.depth * dtype.itemsize + blocks.rows * 4
        if not choices or step * (blocks.stages + 1) // 2 <= _shared_memory(device):
            choices.setdefault(f"{blocks.rows}x{columns}", blocks)
    return choices


def convolution(
    rows: Tensor, kernel: Tensor, table: Tensor, transposed: Callable[[], Tensor], blocks: Blocks
) -> Tensor:
    """Sparse convolution of rows [N_in, Cin] → [N_out, Cout], in float32, bfloat16 or float16.

    Args:
        rows: features.
        kernel: [K, Cin, Cout], in float32 or the same dtype; products are in that of the rows, and its gradient, whose
            sums are float32, is handed on in its own.
        table: int32 [K, N_out], the row under each kernel offset of each output; N_in where there is none.
        transposed: int32 [K, N_in], the output that sees each row at each kernel offset; N_out where there is none.
            Called in the backward pass, if the rows need a gradient.
        blocks: from `block_choices`.
    """
    return _Convolution.apply(rows, kernel, table, transposed, blocks)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, kernel: Tensor, table: Tensor, transposed: Callable[[], Tensor], blocks: Blocks
    ) -> Tensor:
        ctx.kernel_dtype, kernel = kernel.dtype, kernel.to(rows.dtype)
        ctx.save_for_backward(rows, kernel)
        ctx.table, ctx.transposed, ctx.blocks = table, transposed, blocks
        return _multiply(rows, kernel, table, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, kernel = ctx.saved_tensors
        grad_rows = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_rows = _multiply(gradient, kernel.transpose(1, 2), ctx.transposed(), ctx.blocks)
        if ctx.needs_input_grad[1]:
            grad_kernel = _correlate(rows, gradient, ctx.table, ctx.blocks).to(ctx.kernel_dtype)
        return grad_rows, grad_kernel, None, None, None


def _multiply(rows: Tensor, kernel: Tensor, table: Tensor, blocks: Blocks) -> Tensor:
    """Rows [n, C] and matrices [K, C, D] of any strides → [table.shape[1], D]."""
    offsets, depth, columns = kernel.shape
    rows, places = rows.contiguous(), table.shape[1]
    out = rows.new_empty(places, columns)
    block_columns, block_depth = _edge(columns, blocks.columns), _edge(depth, blocks.depth)
    grid = (triton.cdiv(places, blocks.rows) * triton.cdiv(columns, block_columns),)
    with torch.cuda.device_of(rows):
        _multiply_kernel[grid](
            rows, kernel, table, out, len(rows), places, depth, columns, *kernel.stride(),
            OFFSETS=offsets, DEPTH_BLOCKS=triton.cdiv(depth, block_depth),
            ROWS=blocks.rows, COLUMNS=block_columns, DEPTH=block_depth, PRECISION=_precision(),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out


def _correlate(rows: Tensor, gradient: Tensor, table: Tensor, blocks: Blocks) -> Tensor:
    """The kernel's gradient, float32 [K, Cin, Cout], from rows [N_in, Cin] and the outputs' gradient [N_out, Cout]."""
    rows, gradient = rows.contiguous(), gradient.contiguous()
    (offsets, places), in_channels, out_channels = table.shape, rows.shape[1], gradient.shape[1]
    block_in, block_out = _edge(in_channels, blocks.rows), _edge(out_channels, min(blocks.columns, 128))
    tiles = offsets * triton.cdiv(in_channels, block_in) * triton.cdiv(out_channels, block_out)
    # A power of two, so that few kernels are compiled.
    steps = max(MIN_STEPS, triton.cdiv(places, blocks.depth * max(1, PROGRAMS // tiles)))
    steps = triton.next_power_of_2(min(steps, triton.cdiv(places, blocks.depth)))
    parts = triton.cdiv(places, steps * blocks.depth)
    sums = torch.empty(parts, offsets, in_channels, out_channels, dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):
        _correlate_kernel[tiles, parts](
            rows, gradient, table, sums, len(rows), places, offsets, in_channels, out_channels,
            STEPS=steps, IN=block_in, OUT=block_out, DEPTH=blocks.depth, PRECISION=_precision(),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return sums.sum(dim=0)


@cache
def _shared_memory(device: torch.device) -> float:
    """Bytes that a program may have; Triton's interpreter knows no limit."""
    if device.type != "cuda":
        return float("inf")
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _precision() -> str:
    """How float32 is multiplied: as torch's own products are."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _edge(channels: int, largest: int) -> int:
    """A block's edge along so many channels."""
    return max(MIN_EDGE, min(largest, triton.next_power_of_2(channels)))


# A kernel is compiled anew for an argument that is a multiple of 16 and one that is not; the number of rows, which
# differs from batch to batch where images have nodata, gains nothing by it.
@triton.jit(do_not_specialize=["n_rows"])
def _multiply_kernel(
    rows: tl.tensor, kernel: tl.tensor, table: tl.tensor, out: tl.tensor, n_rows: tl.tensor, n_out: tl.tensor,
    depth: tl.tensor, columns: tl.tensor, offset_stride: tl.tensor, depth_stride: tl.tensor, column_stride: tl.tensor,
    OFFSETS: tl.constexpr, DEPTH_BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # The programs of one block of rows run side by side: they gather the same rows, from L2.
    column_blocks = tl.cdiv(columns, COLUMNS)
    place = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    within = tl.arange(0, DEPTH)
    offset_step = tl.cast(n_out, tl.int64)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    # One loop over (offset, block of channels), so that loads run ahead across offsets too.
    for step in range(OFFSETS * DEPTH_BLOCKS):
        offset = step // DEPTH_BLOCKS
        channel = step % DEPTH_BLOCKS * DEPTH + within
        row = tl.load(table + offset * offset_step + place, mask=place < n_out, other=n_rows)
        x = tl.load(
            rows + row.to(tl.int64)[:, None] * depth + channel[None, :],
            mask=(row < n_rows)[:, None] & (channel < depth)[None, :],
            other=0.0,
        )
        matrix = tl.load(
            kernel + offset * offset_stride + channel[:, None] * depth_stride + column[None, :] * column_stride,
            mask=(channel < depth)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        total = tl.dot(x, matrix, total, input_precision=PRECISION)
    tl.store(
        out + place.to(tl.int64)[:, None] * columns + column[None, :],
        total.to(out.dtype.element_ty),
        mask=(place < n_out)[:, None] & (column < columns)[None, :],
    )


@triton.jit(do_not_specialize=["n_rows"])
def _correlate_kernel(
    rows: tl.tensor, gradient: tl.tensor, table: tl.tensor, sums: tl.tensor, n_rows: tl.tensor, n_out: tl.tensor,
    offsets: tl.tensor, in_channels: tl.tensor, out_channels: tl.tensor,
    STEPS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # The programs of one part run side by side: they read the same rows, from L2.
    in_blocks, out_blocks = tl.cdiv(in_channels, IN), tl.cdiv(out_channels, OUT)
    offset = tl.program_id(0) // (in_blocks * out_blocks)
    in_channel = tl.program_id(0) // out_blocks % in_blocks * IN + tl.arange(0, IN)
    out_channel = tl.program_id(0) % out_blocks * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    total = tl.zeros((IN, OUT), dtype=tl.float32)
    for step in range(STEPS):
        place = (part * STEPS + step) * DEPTH + tl.arange(0, DEPTH)
        row = tl.load(table + offset.to(tl.int64) * n_out + place, mask=place < n_out, other=n_rows)
        x = tl.load(
            rows + row.to(tl.int64)[:, None] * in_channels + in_channel[None, :],
            mask=(row < n_rows)[:, None] & (in_channel < in_channels)[None, :],
            other=0.0,
        )
        upstream = tl.load(
            gradient + place.to(tl.int64)[:, None] * out_channels + out_channel[None, :],
            mask=(place < n_out)[:, None] & (out_channel < out_channels)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(x), upstream, total, input_precision=PRECISION)
    cell = (part * offsets + offset).to(tl.int64) * in_channels * out_channels
    tl.store(
        sums + cell + in_channel[:, None] * out_channels + out_channel[None, :],
        total,
        mask=(in_channel < in_channels)[:, None] & (out_channel < out_channels)[None, :],
    )
