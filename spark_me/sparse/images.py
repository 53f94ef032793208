"""Reductions over the sites of each image, never over the batch.

In canonical order the rows of a patch are contiguous. So sites are summed within patches, and the patches' sums are
laid into the grid [B, fh, fw] and summed there: images may differ in their number of sites, nothing collides, and the
order of summation is fixed on every device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spark_me.sparse.pyramid import Pyramid
from spark_me.sparse.tensor import SparseTensor, stride_of

PART_BYTES = 2**20
"""On CPU, products are summed in parts of about this size: they stay in cache and never fill an [N, C] buffer."""


def sum_over_images(features: Tensor, pyramid: Pyramid, stride: int) -> Tensor:
    """Sum over the sites of each image: features [N, C] at `stride` → [B, C]; half precision is summed in float32."""
    return _Sum.apply(features, pyramid, stride)


def mean_over_images(features: Tensor, pyramid: Pyramid, stride: int) -> Tensor:
    """Mean over the sites of each image: features [N, C] at `stride` → [B, C]; half precision as float32."""
    return sum_over_images(features, pyramid, stride) / sites_of_images(pyramid, stride)


def spread_over_sites(of_images: Tensor, pyramid: Pyramid, stride: int) -> Tensor:
    """Give every site its image's values: [B, C] → [N, C] at `stride`. The adjoint of `sum_over_images`."""
    return _Spread.apply(of_images, pyramid, stride)


def scale_images(features: Tensor, factors: Tensor, pyramid: Pyramid, stride: int) -> Tensor:
    """Multiply the sites of each image by its own factors: features [N, C] at `stride` by [B, C], → [N, C]."""
    return _Scale.apply(features, factors, pyramid, stride)


def global_average(x: SparseTensor) -> Tensor:
    """Global average pooling: the mean of each image's visible sites, [B, C]; half precision as float32."""
    return mean_over_images(x.F, x.coordinate_manager, stride_of(x))


def global_maximum(x: SparseTensor) -> Tensor:
    """Global maximum pooling: the largest of each image's visible sites, [B, C]."""
    index = x.coordinate_manager.image_index(stride_of(x))[:, None].expand_as(x.F)
    lowest = x.F.new_full((len(x.coordinate_manager.visible), x.F.shape[1]), float("-inf"))
    return lowest.scatter_reduce(0, index, x.F, "amax")


def sites_of_images(pyramid: Pyramid, stride: int) -> Tensor:
    """int64 [B, 1]: how many sites each image has at `stride`."""
    return pyramid.visible.flatten(1).sum(dim=1, keepdim=True) * pyramid.neighbours.side(stride) ** 2


def first_rows(pyramid: Pyramid, stride: int) -> Tensor:
    """int64 [B + 1]: the first row of each image at `stride`, and the number of rows."""
    return functional.pad(sites_of_images(pyramid, stride).flatten().cumsum(dim=0), (1, 0))


def patch_blocks(features: Tensor, pyramid: Pyramid, stride: int) -> Tensor:
    """The rows of each visible patch: features [N, C] at `stride` → a view [M, (P/s)², C]."""
    return features.reshape(-1, pyramid.neighbours.side(stride) ** 2, features.shape[1])


def spread_over_patches(of_images: Tensor, pyramid: Pyramid) -> Tensor:
    """[B, C] → [M, 1, C], to broadcast over `patch_blocks`."""
    return of_images.index_select(0, pyramid.image_index(pyramid.patch_size))[:, None]


def sum_products_over_images(x: Tensor, y: Tensor, pyramid: Pyramid) -> Tensor:
    """Sum of x·y over the sites of each image, in float32 at least: two `patch_blocks` [M, S, C] → [B, C]."""
    dtype = accumulation_dtype(x)
    of_patches = [
        (x_part.to(dtype) * y_part.to(dtype)).sum(dim=1)
        for x_part, y_part in zip(x.split(patches_in_part(x)), y.split(patches_in_part(x)))
    ]
    return _sum_patches(torch.cat(of_patches), pyramid)


def patches_in_part(blocks: Tensor) -> int:
    """How many of the `patch_blocks` [M, S, C] to process at once: as many as stay in cache, on a GPU all."""
    if blocks.device.type != "cpu":
        return len(blocks)
    return max(1, PART_BYTES // (blocks[0].numel() * blocks.element_size()))


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """What sums are computed in: float32 for half precision, else the features' own."""
    return torch.float32 if features.dtype in (torch.float16, torch.bfloat16) else features.dtype


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, pyramid: Pyramid, stride: int) -> Tensor:
        ctx.pyramid, ctx.stride, ctx.dtype = pyramid, stride, features.dtype
        blocks = patch_blocks(features, pyramid, stride)
        return _sum_patches(blocks.sum(dim=1, dtype=accumulation_dtype(features)), pyramid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(gradient.to(ctx.dtype), ctx.pyramid, ctx.stride), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_images: Tensor, pyramid: Pyramid, stride: int) -> Tensor:
        ctx.pyramid, ctx.stride, ctx.dtype = pyramid, stride, of_images.dtype
        of_sites = spread_over_patches(of_images, pyramid).expand(-1, pyramid.neighbours.side(stride) ** 2, -1)
        return of_sites.reshape(-1, of_images.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(gradient, ctx.pyramid, ctx.stride).to(ctx.dtype), None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, factors: Tensor, pyramid: Pyramid, stride: int) -> Tensor:
        ctx.save_for_backward(features, factors)
        ctx.pyramid, ctx.stride = pyramid, stride
        scaled = patch_blocks(features, pyramid, stride) * spread_over_patches(factors.to(features.dtype), pyramid)
        return scaled.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, factors = ctx.saved_tensors
        blocks, grad_blocks = (patch_blocks(part, ctx.pyramid, ctx.stride) for part in (features, gradient))
        grad_blocks_in = grad_blocks * spread_over_patches(factors.to(gradient.dtype), ctx.pyramid)
        grad_factors = sum_products_over_images(grad_blocks, blocks, ctx.pyramid).to(factors.dtype)
        return grad_blocks_in.view_as(features), grad_factors, None, None


def _sum_patches(of_patches: Tensor, pyramid: Pyramid) -> Tensor:
    """[M, C] → [B, C]."""
    images, rows, columns = pyramid.visible.shape
    grid = of_patches.new_zeros(images * rows * columns, of_patches.shape[1])
    grid.index_copy_(0, pyramid.raster_index(pyramid.patch_size), of_patches)
    return grid.view(images, rows * columns, -1).sum(dim=1)
