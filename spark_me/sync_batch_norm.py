"""Batch normalisation over the images of all processes.

torch's own SyncBatchNorm takes neither sparse tensors nor CPU tensors; this one is plain autograd, so that it can be
proven on CPU against a single process.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn import functional as distributed_functional

from spark_me.drop_path import drop_after


def synchronized_batch_norm(rows: Tensor, norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Normalise rows [N, C] by mean and variance over the rows of all processes; N may differ between them.

    Updates the running statistics of `norm` (unbiased variance), as torch's batch normalisation does.
    """
    x = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    sums = distributed_functional.all_reduce(torch.cat([x.sum(dim=0), x.new_full((1,), x.shape[0])]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    # Two passes: E[x²] − E[x]² would cancel where the mean is large.
    variance = distributed_functional.all_reduce((x - mean).square().sum(dim=0)) / total
    _update_statistics(norm, mean.detach(), (variance * total / (total - 1)).detach())
    normalised = (x - mean) * torch.rsqrt(variance + norm.eps)
    return (normalised * norm.weight + norm.bias).to(rows.dtype)


def _update_statistics(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, unbiased_variance: Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    assert norm.momentum is not None, "a cumulative average is not synchronised"
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(unbiased_variance.to(norm.running_var.dtype), norm.momentum)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the images [B, C, H, W] of all processes; alone or in eval mode it is `nn.BatchNorm2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and several_processes()):
            return super().forward(input)
        rows = input.permute(0, 2, 3, 1).flatten(0, 2)
        normalised = synchronized_batch_norm(rows, self)
        return normalised.view(input.shape[0], *input.shape[2:], -1).permute(0, 3, 1, 2)


class SyncBatchNormAct2d(SyncBatchNorm2d):
    """timm's batch norm with dropout and activation behind it, over the images of all processes."""

    def forward(self, input: Tensor) -> Tensor:
        me: Any = self
        out: Tensor = me.act(me.drop(super().forward(input)))
        return out


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every batch norm of images inside `module` by its synchronised twin, parameters shared.

    On a GPU that of torch's own is `nn.SyncBatchNorm`, which has kernels there.
    """
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child))
    if type(module) is nn.BatchNorm2d:
        return twin_of(module, nn.SyncBatchNorm if module.weight.is_cuda else SyncBatchNorm2d)
    timms = hasattr(module, "act") and hasattr(module, "drop") and not hasattr(module, "synchronised")
    if isinstance(module, nn.BatchNorm2d) and timms:
        twin = SyncBatchNormAct2d.__new__(SyncBatchNormAct2d)
        twin.__dict__ = module.__dict__
        return twin
    return module


def twin_of(norm: nn.modules.batchnorm._BatchNorm, kind: type[nn.modules.batchnorm._BatchNorm]) -> nn.Module:
    """A norm of another kind that shares parameters and statistics with this one."""
    twin = kind(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    twin.weight, twin.bias = norm.weight, norm.bias
    twin.running_mean, twin.running_var = norm.running_mean, norm.running_var
    twin.num_batches_tracked = norm.num_batches_tracked
    rate: Any = getattr(norm, "drop_prob", 0.0)
    if rate:
        drop_after(twin, rate)
    return twin.train(norm.training)


def several_processes() -> bool:
    """Whether there are other processes to synchronise with."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
