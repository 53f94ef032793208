"""Batch normalisation over the visible sites of the batch, together with what follows it in a residual network."""

from torch import Tensor, nn
from torch.nn import functional

from spark_me import sync_batch_norm
from spark_me.sparse.layers import DropPath, add, require_same_sites
from spark_me.sparse.tensor import SparseLayer, SparseTensor, with_features
from spark_me.sparse.triton_support import computes_in_triton
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
        if self.synchronised and self.training and several_processes():
            return complete(with_features(x, synchronized_batch_norm(x.F, self)), shortcut, drop_path, relu)
        if not computes_in_triton(x.F):
            return complete(with_features(x, self._normalise(x.F)), shortcut, drop_path, relu)
        from spark_me.sparse.fused_batch_norm import fused_batch_norm

        if shortcut is not None:
            require_same_sites(x, shortcut)
        scale = None if drop_path is None else drop_path.draw(x)
        return with_features(x, fused_batch_norm(self, x.F, None if shortcut is None else shortcut.F, scale, relu))

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


def complete(
    normalised: SparseTensor, shortcut: SparseTensor | None, drop_path: DropPath | None, relu: bool
) -> SparseTensor:
    """What `BatchNorm2d` does after normalising, in operations of their own; ReLU overwrites its input."""
    x = normalised if drop_path is None else drop_path(normalised)
    if shortcut is not None:
        x = add(x, shortcut)
    return with_features(x, functional.relu_(x.F)) if relu else x
