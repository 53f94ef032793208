"""Activations at every site: torch's own modules, mapping a `SparseTensor` to another one."""

from torch import nn

from spark_me.sparse.tensor import SparseTensor, with_features


class ReLU(nn.ReLU):
    """max(x, 0); `inplace` overwrites the features of `x`, as in `torch.nn.ReLU`."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return with_features(x, super().forward(x.F))


class LeakyReLU(nn.LeakyReLU):
    """x where positive, else `negative_slope`·x."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return with_features(x, super().forward(x.F))


class GELU(nn.GELU):
    """x·Φ(x), exact unless `approximate="tanh"`."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return with_features(x, super().forward(x.F))


class SiLU(nn.SiLU):
    """x·sigmoid(x)."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return with_features(x, super().forward(x.F))


class Hardswish(nn.Hardswish):
    """x·clamp(x + 3, 0, 6) / 6."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return with_features(x, super().forward(x.F))
