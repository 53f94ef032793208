"""Linear layers at every site."""

from torch import nn

from spark_me.sparse.tensor import SparseTensor, with_features


class Linear(nn.Linear):
    """A matrix product and a constant at every site: a 1×1 convolution with the parameters of `torch.nn.Linear`."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return with_features(x, super().forward(x.F))
