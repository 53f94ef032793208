"""Gradient checkpointing of encoder blocks: their inner activations are computed again in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from spark_me.sparse import SparseTensor, at_stride, stride_of, with_features


def checkpointed(block: nn.Module, x: SparseTensor) -> SparseTensor:
    """`block(x)`, keeping only the features of `x` for the backward pass; norm statistics are updated once."""
    strides: list[int] = []

    def run(features: Tensor) -> Tensor:
        out = block(with_features(x, features))
        strides.append(stride_of(out))
        return out.F

    features = checkpoint(run, x.F, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(block)))
    return at_stride(x, strides[0], features)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """The second forward pass must not move running statistics again."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, batches
