"""Sparse tensors and layers on MinkowskiEngine: the only part of spark_me that imports it."""

from spark_me.sparse.images import global_average, mean_over_images, scale_images, spread_over_sites, sum_over_images
from spark_me.sparse.kernels.autotune import choose, measured_choices
from spark_me.sparse.layers import AvgPool2d, Conv2d, DropPath, MaxPool2d, add
from spark_me.sparse.neighbours import VisiblePatches
from spark_me.sparse.norms import (
    BatchNorm2d,
    GlobalResponseNorm,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm,
    convert_sync_batchnorm,
)
from spark_me.sparse.pyramid import BACKENDS, Pyramid
from spark_me.sparse.rules.modules import rule
from spark_me.sparse.tensor import (
    SparseTensor,
    at_stride,
    convolution_to_dense,
    stride_of,
    to_dense,
    to_sparse,
    with_features,
)

__all__ = [
    "BACKENDS",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "DropPath",
    "GlobalResponseNorm",
    "GroupNorm",
    "InstanceNorm2d",
    "LayerNorm",
    "MaxPool2d",
    "Pyramid",
    "SparseTensor",
    "VisiblePatches",
    "add",
    "at_stride",
    "choose",
    "convert_sync_batchnorm",
    "convolution_to_dense",
    "global_average",
    "mean_over_images",
    "measured_choices",
    "rule",
    "scale_images",
    "spread_over_sites",
    "stride_of",
    "sum_over_images",
    "to_dense",
    "to_sparse",
    "with_features",
]
