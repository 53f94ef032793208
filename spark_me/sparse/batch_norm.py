"""Batch normalisation over the visible sites of the batch, together with what follows it in a residual network."""

from torch import Tensor, nn
from torch.nn import functional

from spark_me.sparse.layers import DropPath, add, require_same_sites
from spark_me.sparse.tensor import SparseTensor, with_features
from spark_me.sparse.triton_support import computes_in_triton


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the visible sites of the batch; empty sites enter no statistic.

    A single site has no variance, where torch refuses to train. It is normalised by the running statistics, which it
    does not move: with nodata it may be all that a micro-batch has at the deepest scale, and the run goes on. Which
    statistics count depends on the number of sites alone, so that a repeated step does the same. Processes that
    synchronise have two sites at least.
    """

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
        if not computes_in_triton(x.F):
            return complete(with_features(x, self._normalise(x.F)), shortcut, drop_path, relu)
        from spark_me.sparse.fused_batch_norm import fused_batch_norm

        if shortcut is not None:
            require_same_sites(x, shortcut)
        scale = None if drop_path is None else drop_path.draw(x)
        return with_features(x, fused_batch_norm(self, x.F, None if shortcut is None else shortcut.F, scale, relu))

    def _normalise(self, rows: Tensor) -> Tensor:
        if len(rows) > 1 or self.running_mean is None:
            return super().forward(rows)
        return functional.batch_norm(
            rows, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def complete(
    normalised: SparseTensor, shortcut: SparseTensor | None, drop_path: DropPath | None, relu: bool
) -> SparseTensor:
    """What `BatchNorm` does after normalising, in operations of their own; ReLU overwrites its input."""
    x = normalised if drop_path is None else drop_path(normalised)
    if shortcut is not None:
        x = add(x, shortcut)
    return with_features(x, functional.relu_(x.F)) if relu else x
