"""Activations against torch's functions on the rows."""

import pytest
import torch
from torch.nn import functional

from spark_me import sparse


@pytest.mark.parametrize(
    "layer, function",
    [
        (sparse.ReLU(), functional.relu),
        (sparse.ReLU(inplace=True), functional.relu),
        (sparse.LeakyReLU(0.2), lambda x: functional.leaky_relu(x, 0.2)),
        (sparse.GELU(), functional.gelu),
        (sparse.GELU(approximate="tanh"), lambda x: functional.gelu(x, approximate="tanh")),
        (sparse.SiLU(), functional.silu),
        (sparse.Hardswish(), functional.hardswish),
    ],
)
def test_every_site_takes_the_activation(layer, function, visible):
    x = sparse.to_sparse(4 * torch.randn(len(visible), 5, 24, 32), sparse.Pyramid(visible, 8))
    before = x.F.clone()
    actual = layer(x)
    assert actual.coordinate_map_key == x.coordinate_map_key
    assert torch.equal(actual.F, function(before))
    assert torch.equal(x.F, actual.F if getattr(layer, "inplace", False) else before)
