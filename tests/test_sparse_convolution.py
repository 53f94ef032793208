"""Sparse convolution against dense torch on masked maps."""

import copy
from typing import Any

import pytest
import torch
from conftest import contract_masks, dense_input, mask_at
from torch import nn
from torch.nn import functional

from spark_me import sparse
from spark_me.sparse.rules.modules import from_dense

PATCH = 8


def compare_convolution(arguments, backend, assert_close, side=PATCH, dtype=torch.float64, padding=(0, 0, 0, 0)):
    """torch's layer of the same arguments and parameters on the masked map: outputs and all gradients.

    `padding` is (left, right, top, bottom), zeros around the map of which the sparse layer is told.
    """
    reference = nn.Conv2d(**arguments).to(dtype)
    # as an encoder makes it: with zeros around, its own padding need not keep the sites in place
    layer: Any = from_dense(sparse.Conv2d, copy.deepcopy(reference)) if any(padding) else sparse.Conv2d(**arguments)
    layer.to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    reference.load_state_dict(layer.state_dict())
    left, right, top, bottom = padding
    layer.around = (top, left), (bottom, right)
    ours, theirs = (dense_input(dtype, layer.in_channels, side).requires_grad_() for _ in range(2))
    visible = contract_masks()
    patch = max(side, PATCH)
    sites = sparse.to_sparse(ours, sparse.Pyramid(visible, patch, backend), patch // side)
    actual = sparse.to_dense(layer(sites))
    expected = reference(functional.pad(theirs * mask_at(visible, theirs.shape[2]), padding))
    expected = expected * mask_at(visible, expected.shape[2])
    assert_close(actual, expected, "output")
    upstream = torch.randn(expected.shape, dtype=dtype)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")
    for (name, parameter), wanted in zip(layer.named_parameters(), reference.parameters(), strict=True):
        assert_close(parameter.grad, wanted.grad, f"gradient of {name}")


def convolution(kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, channels=(5, 7)):
    return {
        "in_channels": channels[0],
        "out_channels": channels[1],
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": bias,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kernel_size, stride", [(1, 1), (3, 1), (5, 1), (7, 1), (1, 2), (2, 2), (3, 2), (7, 2), (4, 4)]
)
def test_convolution(kernel_size, stride, bias, dtype, backend, assert_close):
    padding = kernel_size // 2 if kernel_size % 2 else 0
    arguments = convolution(kernel_size, stride, padding, bias=bias)
    compare_convolution(arguments, backend, assert_close, dtype=dtype)


@pytest.mark.parametrize("groups, dilation", [(3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("side, stride", [(16, 2), (8, 1), (8, 2), (4, 1), (4, 2), (2, 1), (2, 2), (1, 1)])
def test_grouped_and_dilated_convolution(side, stride, kernel_size, groups, dilation, backend, assert_close):
    """`side` is the number of input sites along a patch's side: both algorithms of the CPU take part."""
    padding = "same" if stride == 1 else dilation * (kernel_size - 1) // 2
    arguments = convolution(kernel_size, stride, padding, dilation, groups, channels=(6, 12))
    compare_convolution(arguments, backend, assert_close, side)


@pytest.mark.parametrize("side", [16, 4, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        convolution((1, 7), padding=(0, 3)),
        convolution((7, 1), padding=(3, 0)),
        convolution((3, 5), 2, (1, 2)),
        convolution((3, 5), padding=(2, 2), dilation=(2, 1)),
        convolution((3, 5), padding=(1, 2), groups=2, channels=(4, 6)),
        convolution((2, 4), padding="same"),
        convolution((3, 2), padding="same", dilation=(1, 3)),
        convolution(4, 2, 1),
        convolution((4, 3), 2, (1, 1), groups=3, channels=(6, 6)),
        convolution(1, padding="valid"),
        convolution(2, 2, "valid"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments.values())),
)
def test_rectangles_and_kernels_that_are_not_centred(arguments, side, backend, assert_close):
    compare_convolution(arguments, backend, assert_close, side)


@pytest.mark.parametrize("side", [16, 4, 2])
@pytest.mark.parametrize(
    "arguments, padding",
    [
        (convolution(3, 2), (0, 1, 0, 1)),  # TensorFlow's "same"
        (convolution(3, 2), (1, 0, 0, 1)),
        (convolution(5, 2), (1, 2, 1, 2)),
        (convolution(7, 2), (2, 3, 2, 3)),
        (convolution(3, 2, groups=6, channels=(6, 6)), (0, 1, 0, 1)),
        (convolution(1, 2), (-1, 1, -1, 1)),  # every other place, from the second
        (convolution((3, 2), 2, (1, 0)), (-1, 1, 0, 0)),
        (convolution(2, padding="valid"), (0, 1, 1, 0)),
    ],
)
def test_zeros_around_the_map_belong_to_the_convolution(arguments, padding, side, backend, assert_close):
    compare_convolution(arguments, backend, assert_close, side, padding=padding)


def test_a_convolution_is_torchs_own():
    """Its parameters are drawn as torch draws them, and have its names and shapes."""
    layers = []
    for kind in (sparse.Conv2d, nn.Conv2d):
        torch.manual_seed(0)
        layers.append(kind(8, 6, (3, 5), 1, (1, 2), 1, 2))
    assert isinstance(layers[0], nn.Conv2d)
    ours, theirs = (layer.state_dict() for layer in layers)
    assert list(ours) == list(theirs) == ["weight", "bias"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sparse.Conv2d(4, 4, 3),
        lambda: sparse.Conv2d(4, 4, 3, padding="valid"),
        lambda: sparse.Conv2d(4, 4, 2, padding=1),
        lambda: sparse.Conv2d(4, 4, 3, 2),
        lambda: sparse.Conv2d(4, 4, 3, 2, padding=2),
        lambda: sparse.Conv2d(4, 4, 3, (1, 2), padding=1),
        lambda: sparse.Conv2d(4, 4, (3, 1), padding=1),
        lambda: sparse.Conv2d(4, 4, 3, padding=1, dilation=2),
    ],
)
def test_what_shifts_sites_is_refused(make):
    with pytest.raises(ValueError, match="shifts sites: the output needs 1/stride of the input's sides$"):
        make()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_than_zeros_is_refused(mode):
    with pytest.raises(ValueError, match=f"padding_mode='{mode}': sparse convolutions pad with zeros"):
        sparse.Conv2d(4, 4, 3, padding=1, padding_mode=mode)


def test_zeros_beside_other_padding_than_zeros_are_refused():
    for padding, around in (("same", ((0, 0), (1, 1))), (1, ((0, -1), (0, 1)))):
        layer = from_dense(sparse.Conv2d, nn.Conv2d(4, 4, 3, padding=padding))
        layer.around = around
        with pytest.raises(ValueError, match="pads what is (padded with zeros|cropped)"):
            layer.check()
