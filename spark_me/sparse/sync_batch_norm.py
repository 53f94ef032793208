"""Batch normalisation over the sites of all processes.

torch's own SyncBatchNorm takes neither sparse tensors nor CPU tensors; this one is plain autograd, so that it can be
proven on CPU against a single process.
"""

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn import functional as distributed_functional

from spark_me.sparse.layers import BatchNorm
from spark_me.sparse.tensor import SparseTensor, with_features


def synchronized_batch_norm(rows: Tensor, norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Normalise rows [N, C] by mean and variance over the rows of all processes; N may differ between them.

    Updates the running statistics of `norm` (unbiased variance), as torch's batch normalisation does.
    """
    x = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    sums = distributed_functional.all_reduce(torch.cat([x.sum(dim=0), x.new_tensor([x.shape[0]])]))
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


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` over the visible sites of all processes; alone or in eval mode it is `BatchNorm`."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not (self.training and _several_processes()):
            return super().forward(x)
        return with_features(x, synchronized_batch_norm(x.F, self))


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the images [B, C, H, W] of all processes; alone or in eval mode it is `nn.BatchNorm2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and _several_processes()):
            return super().forward(input)
        rows = input.permute(0, 2, 3, 1).flatten(0, 2)
        normalised = synchronized_batch_norm(rows, self)
        return normalised.view(input.shape[0], *input.shape[2:], -1).permute(0, 3, 1, 2)


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every `BatchNorm` and `nn.BatchNorm2d` inside `module` by its synchronised twin, parameters shared.

    Dense norms on a GPU become torch's own `nn.SyncBatchNorm`, which has kernels there.
    """
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child))
    if type(module) not in (BatchNorm, nn.BatchNorm2d):
        return module
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    twin: type[nn.modules.batchnorm._BatchNorm]
    if isinstance(module, BatchNorm):
        twin = SyncBatchNorm
    else:
        twin = nn.SyncBatchNorm if module.weight.is_cuda else SyncBatchNorm2d
    converted = twin(module.num_features, eps=module.eps, momentum=module.momentum)
    converted.weight, converted.bias = module.weight, module.bias
    converted.running_mean, converted.running_var = module.running_mean, module.running_var
    converted.num_batches_tracked = module.num_batches_tracked
    return converted.train(module.training)


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
