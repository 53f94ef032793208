"""What SparK asks of an encoder."""

from torch import nn

from spark_me import sparse
from spark_me.sparse import SparseTensor


class SparseEncoder(nn.Module):
    """A convnet on sparse tensors, without a classifier: what an encoder of one's own subclasses.

    Attributes:
        strides: of the feature scales, shallow to deep: each half of the next, the last is the total stride.
        channels: of the feature scales.
        total_stride: the patch size P that masks need; a power of two, 8 to 64 in practice.
        densify_norm: from a number of channels, the norm that densifying applies to each feature scale.
        checkpointing: whether blocks keep only their inputs for the backward pass, for less memory and more time.
    """

    strides: tuple[int, ...]
    channels: tuple[int, ...]
    total_stride: int
    densify_norm: type[nn.Module] = sparse.BatchNorm
    checkpointing: bool = False

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """Features of every scale, shallow to deep, of a sparse image at stride 1."""
        raise NotImplementedError

    def start_residuals(self, weight: float) -> bool:
        """Start the norms that end residual branches at this weight; False if there are none of them."""
        return False
