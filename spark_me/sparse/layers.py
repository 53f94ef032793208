"""Sparse layers: MinkowskiEngine's own modules and parameters behind the constructor calls of `torch.nn`.

Every layer maps a `SparseTensor` to another one. How it computes is said by the tensor's pyramid (`backend`); tensors
on another coordinate manager of MinkowskiEngine take its stock kernels. Those exist for float32 and float64 only, so
under autocast they compute in the dtype of the parameters.
"""

import torch
from torch import Tensor, nn

from spark_me.sparse import fused
from spark_me.sparse.minkowski import ME
from spark_me.sparse.neighbours import Window
from spark_me.sparse.pyramid import Pyramid
from spark_me.sparse.tensor import SparseTensor, at_stride, compute_dtype, stride_of, with_features


class Conv2d(ME.MinkowskiConvolution):
    """Sparse convolution: outputs at the visible sites of the output stride, empty neighbours count as zero.

    Odd kernels are centred (padding k // 2), even kernels start at the site (no padding). `kernel` is
    [K, Cin, Cout], or [Cin, Cout] for 1×1 stride 1; `spark_me.weights.kernels` brings it to torch's layout.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size=kernel_size, stride=stride, bias=bias, dimension=2)
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not _is_fused(x):
            with torch.autocast(x.F.device.type, enabled=False):
                return super().forward(with_features(x, x.F.to(self.kernel.dtype)))
        dtype = compute_dtype(self.kernel)
        window = Window(stride_of(x), self.kernel_size, self.stride)
        rows = fused.convolution(x.F.to(dtype), self.kernel.to(dtype), window, x.coordinate_manager.neighbours)
        if self.bias is not None:
            rows = rows + self.bias.to(dtype)
        return at_stride(x, window.out_stride, rows)


class MaxPool2d(ME.MinkowskiMaxPooling):
    """Maximum over the visible sites under the kernel; empty sites are ignored, not taken as zero."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__(kernel_size=kernel_size, stride=stride, dimension=2)
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not _is_fused(x):
            return super().forward(_in_engine_dtype(x))
        window = Window(stride_of(x), self.kernel_size, self.stride)
        return at_stride(x, window.out_stride, fused.max_pool(x.F, window, x.coordinate_manager.neighbours))


class AvgPool2d(ME.MinkowskiAvgPooling):
    """Mean over the visible sites under the kernel: divides by their number, not by the kernel's volume."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__(kernel_size=kernel_size, stride=stride, dimension=2)

    def forward(self, x: SparseTensor) -> SparseTensor:
        return super().forward(_in_engine_dtype(x))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the visible sites of the batch; empty sites enter no statistic."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return with_features(x, super().forward(x.F))


class DropPath(nn.Module):
    """Stochastic depth: drop the residual branch of whole images, scale the kept ones by 1 / (1 − rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not self.training or self.rate == 0:
            return x
        pyramid = x.coordinate_manager
        kept = torch.rand(pyramid.visible.shape[0], device=x.F.device) >= self.rate
        scale_of_image = kept.to(x.F.dtype) / (1 - self.rate)
        return with_features(x, x.F * scale_of_image[pyramid.image_index(stride_of(x))][:, None])

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def add(x: SparseTensor, y: SparseTensor) -> SparseTensor:
    """Residual sum of two tensors on the same sites.

    Raises:
        ValueError: if the two live on different sites.
    """
    if x.coordinate_manager is not y.coordinate_manager or x.coordinate_map_key != y.coordinate_map_key:
        raise ValueError("cannot add sparse tensors of different sites")
    return with_features(x, x.F + y.F)


def _is_fused(x: SparseTensor) -> bool:
    return isinstance(x.coordinate_manager, Pyramid) and x.coordinate_manager.backend == "fused"


def _in_engine_dtype(x: SparseTensor) -> SparseTensor:
    features: Tensor = x.F
    return x if features.dtype in (torch.float32, torch.float64) else with_features(x, features.float())
