"""Where our Triton kernels compute. Importing this imports no Triton: their modules are imported where one is used."""

import importlib.util
from functools import cache

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""float64 stays with torch's operations, which the proofs of exactness compare in."""


@cache
def triton_available() -> bool:
    """Whether Triton is installed. torch for CUDA brings it along on Linux."""
    return importlib.util.find_spec("triton") is not None


def computes_in_triton(rows: Tensor) -> bool:
    """Whether rows [N, C] are normalised by our kernels: on a GPU, in single or half precision."""
    return rows.is_cuda and rows.dtype in KERNEL_DTYPES and triton_available()
