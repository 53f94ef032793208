"""From dense maps to sparse tensors and back, by the pyramid's sites and never by pixel values."""

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from spark_me.sparse import native
from spark_me.sparse.minkowski import ME
from spark_me.sparse.pyramid import Pyramid

SparseTensor: TypeAlias = ME.SparseTensor


class SparseLayer:
    """A layer of torch's on sparse tensors: printed, it says so."""

    def _get_name(self) -> str:
        return f"Sparse{type(self).__name__}"


def stride_of(x: SparseTensor) -> int:
    """The tensor stride s of a sparse tensor (equal down and across)."""
    return x.coordinate_map_key.get_tensor_stride()[0]


def is_native(x: SparseTensor) -> bool:
    """Whether layers compute `x` with the `native` backend's kernels."""
    return isinstance(x.coordinate_manager, Pyramid) and x.coordinate_manager.backend == "native"


def with_features(x: SparseTensor, features: Tensor) -> SparseTensor:
    """The sites of `x` with other features [N, C]."""
    return SparseTensor(features, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """What products with this parameter compute in: autocast's dtype where it is on, else the parameter's."""
    device = parameter.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype


def at_stride(x: SparseTensor, stride: int, features: Tensor) -> SparseTensor:
    """Features [N, C] at the sites of another stride of the pyramid that `x` lives on."""
    pyramid = x.coordinate_manager
    return SparseTensor(features, coordinate_map_key=pyramid.key(stride), coordinate_manager=pyramid)


def to_sparse(dense: Tensor, pyramid: Pyramid, stride: int = 1) -> SparseTensor:
    """Gather the visible sites of a dense map: [B, C, H/s, W/s] → features [N, C] in canonical order.

    Raises:
        ValueError: if the map's shape is not the pyramid's at this stride.
    """
    images, height, width = pyramid.extent(stride)
    if dense.dim() != 4 or (dense.shape[0], *dense.shape[2:]) != (images, height, width):
        raise ValueError(f"expected [{images}, C, {height}, {width}] at stride {stride}, not {list(dense.shape)}")
    rows = dense.permute(0, 2, 3, 1).reshape(-1, dense.shape[1])
    features = rows.index_select(0, pyramid.raster_index(stride))
    return SparseTensor(features, coordinate_map_key=pyramid.key(stride), coordinate_manager=pyramid)


def to_dense(x: SparseTensor, fill: Tensor | None = None) -> Tensor:
    """Lay the sites of `x` into a dense map: features [N, C] → [B, C, H/s, W/s], channels last in memory.

    The shape is the pyramid's, so hidden patches at the border keep their place.

    Args:
        x: a sparse tensor on a `Pyramid`.
        fill: [C], the value at every empty site; zero when None.
    """
    dense: Tensor = x.coordinate_manager.raster(x.F, stride_of(x), fill)
    return dense


def convolution_to_dense(x: SparseTensor, weight: Tensor) -> Tensor:
    """Dense convolution (odd kernel, stride 1, padded to equal size) of a map that is zero at empty sites.

    The same as `conv2d(to_dense(x), weight, padding=k // 2)`, for the visible share of its arithmetic.

    Args:
        x: features [N, Cin] on a `Pyramid`.
        weight: [Cout, Cin, k, k].

    Returns:
        [B, Cout, h, w], channels last in memory.
    """
    pyramid, stride = x.coordinate_manager, stride_of(x)
    images, height, width = pyramid.extent(stride)
    rows = x.F.to(compute_dtype(weight))
    if weight.shape[-1] == 1:
        return to_dense(with_features(x, functional.linear(rows, weight.flatten(1).to(rows.dtype))))
    rows = native.convolution_to_raster(rows, weight, stride, pyramid)
    return rows.view(images, height, width, -1).permute(0, 3, 1, 2)
