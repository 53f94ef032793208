"""Squeeze-and-excitation against torchvision's module on each image's visible sites alone."""

import pytest
import torch
import torchvision
from conftest import randomise
from torch import nn

from spark_me import sparse

PATCH = 8


@pytest.mark.parametrize("scale_activation", [nn.Sigmoid, nn.Hardsigmoid])
@pytest.mark.parametrize("stride", [2, 8])
def test_excitation_is_per_image_over_visible_sites(stride, scale_activation, visible, backend, assert_close):
    reference = torchvision.ops.SqueezeExcitation(6, 4, scale_activation=scale_activation).double()
    layer = sparse.SqueezeExcite(6, 4, scale_activation=scale_activation).double()
    layer.load_state_dict(randomise(reference).state_dict())
    side = PATCH // stride
    ours, theirs = (
        torch.randn(6, 6, 3 * side, 4 * side, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        .requires_grad_()
        for _ in range(2)
    )  # fmt: skip
    actual = sparse.to_dense(layer(sparse.to_sparse(ours, sparse.Pyramid(visible, PATCH, backend), stride)))

    expected = torch.zeros_like(actual)
    for image, mask in enumerate(visible.repeat_interleave(side, 1).repeat_interleave(side, 2)):
        sites = theirs[image][:, mask]  # [C, n]: an image of 1 × n sites
        expected[image, :, mask] = reference(sites[None, :, None])[0, :, 0]
    assert_close(actual, expected, "output")
    upstream = torch.randn_like(expected)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")
    for (name, parameter), wanted in zip(layer.named_parameters(), reference.parameters(), strict=True):
        assert_close(parameter.grad, wanted.grad, f"gradient of {name}")


def test_half_precision_is_kept(visible):
    layer = sparse.SqueezeExcite(6, 4)
    x = sparse.to_sparse(torch.randn(6, 6, 12, 16, dtype=torch.bfloat16), sparse.Pyramid(visible, PATCH), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).F.dtype == torch.bfloat16
