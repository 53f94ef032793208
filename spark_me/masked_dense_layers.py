"""What the dense simulations of all encoders share: maps with an explicit mask."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from spark_me.masking import upsample_visible


def mask_like(x: Tensor, visible: Tensor) -> Tensor:
    """`visible` [B, fh, fw] at the resolution of x [B, C, h, w]: bool [B, 1, h, w]."""
    return upsample_visible(visible, x.shape[2] // visible.shape[1])[:, None]


def mask_out(x: Tensor, visible: Tensor) -> Tensor:
    """Zero the hidden sites of x [B, C, h, w]."""
    return x * mask_like(x, visible)


def masked_batch_norm(norm: nn.BatchNorm2d, x: Tensor, visible: Tensor) -> Tensor:
    """Batch norm of x [B, C, h, w] with the statistics of visible sites; hidden sites become zero."""
    assert norm.momentum is not None
    if torch.compiler.is_compiling():
        return _batch_norm_of_maps(norm, x, visible)
    mask = mask_like(x, visible)[:, 0]
    rows = x.permute(0, 2, 3, 1)[mask]  # [N, C]
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    normalised = functional.batch_norm(
        rows,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
    )
    dense = normalised.new_zeros(x.shape[0], *x.shape[2:], x.shape[1])
    dense[mask] = normalised
    return dense.permute(0, 3, 1, 2)


def _batch_norm_of_maps(norm: nn.BatchNorm2d, x: Tensor, visible: Tensor) -> Tensor:
    """The same without rows, whose number depends on the mask: for a compiler, which makes few kernels of it."""
    assert norm.momentum is not None and norm.running_mean is not None and norm.running_var is not None
    features, mask = x.to(norm.weight.dtype), mask_like(x, visible)
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        sites = mask.sum()
        mean = (features * mask).sum(dim=(0, 2, 3)) / sites
        variance = ((features - mean[:, None, None]).square() * mask).sum(dim=(0, 2, 3)) / sites
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * sites / (sites - 1), norm.momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    normalised = (features - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    return (normalised * mask).to(x.dtype)


def drop_images(residual: Tensor, rate: float) -> Tensor:
    """Stochastic depth of maps [B, C, h, w]: zero whole images, scale the kept ones by 1 / (1 − rate)."""
    kept = torch.rand(len(residual), device=residual.device) >= rate
    return residual * (kept.to(residual.dtype) / (1 - rate)).view(-1, 1, 1, 1)
