"""Batch normalisation over the visible sites of all processes."""

from torch import nn

from spark_me import sync_batch_norm
from spark_me.sparse.batch_norm import BatchNorm, complete
from spark_me.sparse.layers import DropPath
from spark_me.sparse.tensor import SparseTensor, with_features


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` over the visible sites of all processes; alone or in eval mode it is `BatchNorm`."""

    def forward(
        self,
        x: SparseTensor,
        shortcut: SparseTensor | None = None,
        drop_path: DropPath | None = None,
        relu: bool = False,
    ) -> SparseTensor:
        if not (self.training and sync_batch_norm.several_processes()):
            return super().forward(x, shortcut, drop_path, relu)
        normalised = with_features(x, sync_batch_norm.synchronized_batch_norm(x.F, self))
        return complete(normalised, shortcut, drop_path, relu)


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every `BatchNorm` and `nn.BatchNorm2d` inside `module` by its synchronised twin, parameters shared."""
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child))
    if type(module) is BatchNorm:
        return sync_batch_norm.twin_of(module, SyncBatchNorm)
    return sync_batch_norm.convert_sync_batchnorm(module)
