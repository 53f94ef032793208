"""MinkowskiEngine's kernels, as FCMAE's checkpoints hold them, against loops over offsets."""

import itertools

import pytest
import torch
from torch.nn import functional

from spark_me.weights.canonical import kernel_to_weight, weight_to_kernel


@pytest.mark.parametrize(
    "kernel_size, shape", [(1, (3, 5)), (1, (1, 3, 5)), (2, (4, 3, 5)), (7, (49, 3, 5)), (7, (49, 5))]
)
def test_round_trip_is_bitwise(kernel_size, shape):
    kernel = torch.randn(shape)
    weight = kernel_to_weight(kernel, kernel_size)
    assert weight.shape == (5, 1 if shape == (49, 5) else 3, kernel_size, kernel_size)
    assert torch.equal(weight_to_kernel(weight, kernel.shape), kernel)


def test_offsets_vary_fastest_along_y():
    kernel = torch.arange(9.0).view(9, 1, 1)
    assert kernel_to_weight(kernel, 3)[0, 0].tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    kernel = torch.randn(4, 3, 5)
    for down, across, channel_in, channel_out in itertools.product(range(2), range(2), range(3), range(5)):
        expected = kernel.view(2, 2, 3, 5)[across, down, channel_in, channel_out]
        assert kernel_to_weight(kernel, 2)[channel_out, channel_in, down, across] == expected


def test_depthwise_kernels(assert_close):
    """[K, C], y fastest, against a loop over offsets."""
    generator = torch.Generator().manual_seed(0)
    kernel, x = (torch.randn(shape, generator=generator).double() for shape in ((49, 3), (2, 3, 9, 8)))
    expected = torch.zeros(2, 3, 3, 2).double()
    for dx in range(7):
        for dy in range(7):
            expected += kernel[7 * dx + dy, :, None, None] * x[:, :, dy : dy + 3, dx : dx + 2]
    assert_close(functional.conv2d(x, kernel_to_weight(kernel, 7), groups=3), expected)
