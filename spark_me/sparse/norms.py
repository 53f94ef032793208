"""Normalisation over visible sites: of the batch, of each image, of one site; and what follows it in a network."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spark_me import sync_batch_norm
from spark_me.sparse.images import (
    accumulation_dtype,
    first_rows,
    mean_over_images,
    patch_blocks,
    patches_in_part,
    scale_images,
    spread_over_patches,
    spread_over_sites,
    sum_products_over_images,
)
from spark_me.sparse.kernels.autotune import computes_in_triton
from spark_me.sparse.layers import DropPath, add, require_same_sites
from spark_me.sparse.pyramid import Pyramid
from spark_me.sparse.tensor import SparseLayer, SparseTensor, stride_of, with_features
from spark_me.sync_batch_norm import several_processes, synchronized_batch_norm


class BatchNorm2d(SparseLayer, nn.BatchNorm2d):
    """Batch normalisation over the visible sites of the batch; empty sites enter no statistic.

    A single site has no variance, where torch refuses to train. It is normalised by the running statistics, which it
    does not move: with nodata it may be all that a micro-batch has at the deepest scale, and the run goes on. Which
    statistics count depends on the number of sites alone, so that a repeated step does the same. Processes that
    synchronise have two sites at least.

    Attributes:
        synchronised: whether statistics in training are over the visible sites of all processes.
    """

    synchronised: bool = False

    def forward(
        self,
        x: SparseTensor,
        shortcut: SparseTensor | None = None,
        drop_path: DropPath | None = None,
        relu: bool = False,
    ) -> SparseTensor:
        """Normalise `x`, drop and add it to a shortcut, take ReLU: the last three where asked for.

        On a GPU all of it is one operation, which reads and writes the features once instead of up to four times.

        Args:
            x: features [N, C].
            shortcut: features [N, C] on the same sites.
            drop_path: stochastic depth of the normalised features.
            relu: whether negative results become zero.

        Raises:
            ValueError: if `shortcut` lives on other sites, or a norm without running statistics sees a single site.
        """
        synchronise = self.synchronised and self.training and several_processes()
        if computes_in_triton(x.F):
            from spark_me.sparse.kernels.batch_norm import fused_batch_norm

            if shortcut is not None:
                require_same_sites(x, shortcut)
            scale = None if drop_path is None else drop_path.draw(x)
            added = None if shortcut is None else shortcut.F
            return with_features(x, fused_batch_norm(self, x.F, added, scale, relu, synchronise=synchronise))
        out = with_features(x, synchronized_batch_norm(x.F, self) if synchronise else self._normalise(x.F))
        if drop_path is not None:
            out = drop_path(out)
        if shortcut is not None:
            out = add(out, shortcut)
        return with_features(out, functional.relu_(out.F)) if relu else out

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 2:
            raise ValueError(f"expected features [N, C], not {list(input.shape)}")

    def _normalise(self, rows: Tensor) -> Tensor:
        if len(rows) > 1 or self.running_mean is None:
            return super().forward(rows)
        return functional.batch_norm(
            rows, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Synchronise every batch norm inside `module`, of sparse tensors and of images; parameters are shared."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.synchronised = True
    return sync_batch_norm.convert_sync_batchnorm(module)


EPSILON = 1e-6
"""Of the global response norm, beside the mean of the channels' norms."""


class LayerNorm(SparseLayer, nn.LayerNorm):
    """Layer normalisation over the channels of every site: the dtype of x is kept, statistics are float32 at least."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        rows = x.F
        if not rows.is_cuda:
            out = functional.layer_norm(rows, self.normalized_shape, self.weight, self.bias, self.eps)
            return with_features(x, out)
        # On a GPU, autocast would convert the rows to float32 and hand that on; and torch's kernel takes one dtype.
        with torch.autocast("cuda", enabled=False):
            weight, bias = (None if each is None else each.to(rows.dtype) for each in (self.weight, self.bias))
            return with_features(x, functional.layer_norm(rows, self.normalized_shape, weight, bias, self.eps))


class GroupNorm(SparseLayer, nn.GroupNorm):
    """Group normalisation: mean and biased variance of each image's groups of channels, over its visible sites."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return _normalise_images(x, self.num_groups, self.eps, self.weight, self.bias)


class InstanceNorm2d(SparseLayer, nn.InstanceNorm2d):
    """Instance normalisation: mean and biased variance of each image's channels, over its visible sites.

    An image with a single site has no variance: its normalised features are zero, where torch refuses to train.
    """

    def check(self) -> None:
        """Refuse running statistics, which are of no batch.

        Raises:
            ValueError: if it keeps them.
        """
        if self.track_running_stats:
            raise ValueError("track_running_stats=True: statistics here are each image's own")

    def forward(self, x: SparseTensor) -> SparseTensor:
        return _normalise_images(x, self.num_features, self.eps, self.weight, self.bias)


class GlobalResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2 (arXiv 2301.00808, section 3.3), per image over its visible sites.

    γ·x·G / (mean of G over the channels + 1e-6) + β + x, where G is the L2 norm of a channel over the sites of the
    image. Statistics are computed in float32 at least; the output has the dtype of the input. γ and β are called weight
    and bias, as in timm.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def check(self) -> None:
        """Refuse another constant beside the mean of the norms.

        Raises:
            ValueError: for another.
        """
        if getattr(self, "eps", EPSILON) != EPSILON:
            raise ValueError(f"eps={self.eps}: must be {EPSILON}")

    def forward(self, x: SparseTensor, gelu: bool = False) -> SparseTensor:
        """Normalise `x`, or, where asked for, GELU of `x`: on a GPU that is one operation, which keeps only `x`."""
        pyramid, stride = x.coordinate_manager, stride_of(x)
        if gelu and computes_in_triton(x.F):
            from spark_me.sparse.kernels.response_norm import fused_gelu_response_norm

            rows = fused_gelu_response_norm(x.F, self.weight, self.bias, first_rows(pyramid, stride))
        else:
            rows = functional.gelu(x.F) if gelu else x.F
            rows = _GlobalResponseNorm.apply(rows, self.weight, self.bias, pyramid, stride)
        return with_features(x, rows)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}"


def _normalise_images(
    x: SparseTensor, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> SparseTensor:
    """Statistics over each image's sites and groups of channels, in float32 at least; the dtype of x is kept."""
    centred, variance = centre_images(x, groups)
    factors = torch.rsqrt(variance + eps)
    factors = factors if weight is None else factors * weight
    normalised = scale_images(centred, factors, x.coordinate_manager, stride_of(x))
    return with_features(x, (normalised if bias is None else normalised + bias).to(x.F.dtype))


def centre_images(x: SparseTensor, groups: int) -> tuple[Tensor, Tensor]:
    """Features [N, C] less the mean of each image's group of channels, and the biased variance [B, C] of these."""
    pyramid, stride = x.coordinate_manager, stride_of(x)
    rows = x.F.to(accumulation_dtype(x.F))
    mean = _mean_of_groups(mean_over_images(rows, pyramid, stride), groups)
    # Two passes: E[x²] − E[x]² would cancel where the mean is large.
    centred = rows - spread_over_sites(mean, pyramid, stride)
    return centred, _mean_of_groups(mean_over_images(centred.square(), pyramid, stride), groups)


def _mean_of_groups(of_channels: Tensor, groups: int) -> Tensor:
    """Give every channel its group's mean: [B, C] → [B, C]."""
    grouped = of_channels.view(len(of_channels), groups, -1)
    return grouped.mean(dim=2, keepdim=True).expand_as(grouped).reshape_as(of_channels)


class _GlobalResponseNorm(torch.autograd.Function):
    """Written out because it runs on a block's widest features: autograd would keep and traverse several more."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gamma: Tensor, beta: Tensor, pyramid: Pyramid, stride: int) -> Tensor:
        blocks = patch_blocks(rows, pyramid, stride)
        norm = sum_products_over_images(blocks, blocks, pyramid).sqrt()
        scale = spread_over_patches(scale_of_images(norm, gamma).to(rows.dtype), pyramid)
        ctx.save_for_backward(rows, gamma, norm)
        ctx.pyramid, ctx.stride, ctx.beta_dtype = pyramid, stride, beta.dtype
        return torch.addcmul(beta.to(rows.dtype), blocks, scale).view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, gamma, norm = ctx.saved_tensors
        blocks, grad_blocks = (patch_blocks(part, ctx.pyramid, ctx.stride) for part in (rows, gradient))
        grad_scale = sum_products_over_images(grad_blocks, blocks, ctx.pyramid)
        pull, grad_gamma = gradients_of_scale(norm, gamma, grad_scale)
        scale = scale_of_images(norm, gamma)
        grad_rows = _weighted_sum(grad_blocks, scale, blocks, pull, ctx.pyramid).view_as(rows)
        grad_beta = gradient.sum(dim=0, dtype=accumulation_dtype(gradient)).to(ctx.beta_dtype)
        return grad_rows, grad_gamma, grad_beta, None, None


def scale_of_images(norm: Tensor, gamma: Tensor) -> Tensor:
    """What the global response norm multiplies features with, before it adds β: [B, C] from norms [B, C]."""
    return 1 + gamma * (norm / (norm.mean(dim=1, keepdim=True) + EPSILON))


def gradients_of_scale(norm: Tensor, gamma: Tensor, grad_scale: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient [B, C] of `scale_of_images`: the pull p of the norms, and the gradient [C] of gamma.

    The features x get the gradient p·x [B, C] through the norms.
    """
    mean = norm.mean(dim=1, keepdim=True) + EPSILON
    response = norm / mean
    grad_response = gamma * grad_scale
    grad_norm = (grad_response - (grad_response * response).mean(dim=1, keepdim=True)) / mean
    # The norm of a channel that is zero at all sites has the subgradient zero.
    pull = torch.where(norm > 0, grad_norm / norm, 0)
    return pull, (grad_scale * response).sum(dim=0).to(gamma.dtype)


def _weighted_sum(x: Tensor, x_scale: Tensor, y: Tensor, y_scale: Tensor, pyramid: Pyramid) -> Tensor:
    """x·x_scale + y·y_scale of `patch_blocks` [M, S, C] with factors [B, C] of each image, part by part."""
    x_scale, y_scale = (spread_over_patches(scale.to(x.dtype), pyramid) for scale in (x_scale, y_scale))
    total = torch.empty_like(x)
    step = patches_in_part(x)
    for parts in zip(*(tensor.split(step) for tensor in (total, x, x_scale, y, y_scale))):
        total_part, x_part, x_scale_part, y_part, y_scale_part = parts
        torch.mul(x_part, x_scale_part, out=total_part)
        total_part.addcmul_(y_part, y_scale_part)
    return total
