"""GELU followed by a global response norm, in Triton's kernels."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark_me.sparse import response_norm_kernels as kernels
from spark_me.sparse.norms import gradients_of_scale, scale_of_images

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
        kernels.squares_of_parts[grid](rows, first_rows, squares, *sizes)
        norm = squares.sum(dim=1).sqrt()
        out = torch.empty_like(rows)
        kernels.respond[grid](rows, first_rows, scale_of_images(norm, gamma), beta, out, *sizes)
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
        kernels.gradient_sums_of_parts[grid](rows, gradient, first_rows, *of_parts, *sizes)
        sums, grad_scale = of_parts.sum(dim=2)
        pull, grad_gamma = gradients_of_scale(norm, gamma, grad_scale)
        scale = scale_of_images(norm, gamma)
        grad_rows = torch.empty_like(rows)
        kernels.input_gradient[grid](rows, gradient, first_rows, scale, pull, grad_rows, *sizes)
        return grad_rows, grad_gamma, sums.sum(dim=0).to(ctx.beta_dtype), None


def _partition(images: int, channels: int) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """The grid (columns of tiles, images, parts of an image), and (channels, parts, rows and channels of a tile)."""
    width = min(64, triton.next_power_of_2(channels))
    columns = triton.cdiv(channels, width)
    parts = triton.cdiv(PROGRAMS, images * columns)
    return (columns, images, parts), (channels, parts, TILE // width, width)
