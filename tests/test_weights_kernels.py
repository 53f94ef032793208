import itertools

import pytest
import torch
from torch import nn

from spark_me import sparse
from spark_me.weights.kernels import kernel_to_weight, to_dense_state, weight_to_kernel


@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (1, 2), (2, 2), (3, 1), (7, 2)])
def test_round_trip_is_bitwise(kernel_size, stride):
    kernel = torch.randn_like(sparse.Conv2d(3, 5, kernel_size, stride).kernel)
    weight = kernel_to_weight(kernel, kernel_size)
    assert weight.shape == (5, 3, kernel_size, kernel_size)
    assert torch.equal(weight_to_kernel(weight, kernel.shape), kernel)


@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (3, 1), (3, 2)])
def test_a_grouped_layer_becomes_torchs(kernel_size, stride):
    layer = sparse.Conv2d(6, 8, kernel_size, stride, groups=2, bias=True)
    dense = nn.Sequential(nn.Conv2d(6, 8, kernel_size, stride, groups=2))
    dense.load_state_dict(to_dense_state(nn.Sequential(layer).state_dict(), dense))
    assert torch.equal(dense[0].bias, layer.bias[0])
    kernel = layer.kernel.detach().view(kernel_size, kernel_size, 3, 8)
    for down, across, channel_in, channel_out in itertools.product(range(kernel_size), range(kernel_size), [1], [5]):
        expected = kernel[across, down, channel_in, channel_out]
        assert dense[0].weight[channel_out, channel_in, down, across] == expected
    assert torch.equal(weight_to_kernel(dense[0].weight, layer.kernel.shape), layer.kernel)


def test_offsets_vary_fastest_along_y():
    kernel = torch.arange(9.0).view(9, 1, 1)
    assert kernel_to_weight(kernel, 3)[0, 0].tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_depthwise_kernels_and_biases_by_module_type(assert_close):
    """The engine's depthwise kernel [K, C], y fastest, and bias [1, C] against a loop over offsets."""
    generator = torch.Generator().manual_seed(0)
    kernel, bias, x = (torch.randn(shape, generator=generator).double() for shape in ((49, 3), (1, 3), (2, 3, 9, 8)))
    state = to_dense_state({"0.kernel": kernel, "0.bias": bias}, network := nn.Sequential(nn.Conv2d(3, 3, 7, groups=3)))
    network.double().load_state_dict(state, strict=True)
    expected = bias[0, :, None, None].expand(2, 3, 3, 2).clone()
    for dx in range(7):
        for dy in range(7):
            expected += kernel[7 * dx + dy, :, None, None] * x[:, :, dy : dy + 3, dx : dx + 2]
    assert_close(network(x), expected)
    assert torch.equal(weight_to_kernel(state["0.weight"], kernel.shape), kernel)
