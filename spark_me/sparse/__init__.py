"""Sparse tensors and layers on MinkowskiEngine: the only part of spark_me that imports it."""

from spark_me.sparse.layers import AvgPool2d, BatchNorm, Conv2d, DropPath, MaxPool2d, ReLU, add
from spark_me.sparse.pyramid import BACKENDS, Pyramid
from spark_me.sparse.sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm
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
    "BatchNorm",
    "Conv2d",
    "DropPath",
    "MaxPool2d",
    "Pyramid",
    "ReLU",
    "SparseTensor",
    "SyncBatchNorm",
    "add",
    "at_stride",
    "convolution_to_dense",
    "convert_sync_batchnorm",
    "stride_of",
    "to_dense",
    "to_sparse",
    "with_features",
]
