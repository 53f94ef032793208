import pytest
import torch

from spark_me import sparse
from spark_me.weights.kernels import kernel_to_weight, weight_to_kernel


@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (1, 2), (2, 2), (3, 1), (7, 2)])
def test_round_trip_is_bitwise(kernel_size, stride):
    kernel = torch.randn_like(sparse.Conv2d(3, 5, kernel_size, stride).kernel)
    weight = kernel_to_weight(kernel, kernel_size)
    assert weight.shape == (5, 3, kernel_size, kernel_size)
    assert torch.equal(weight_to_kernel(weight, kernel.shape), kernel)


def test_offsets_vary_fastest_along_y():
    kernel = torch.arange(9.0).view(9, 1, 1)
    assert kernel_to_weight(kernel, 3)[0, 0].tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
