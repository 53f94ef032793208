"""Depthwise convolution against dense torch on masked maps, against finite differences, and what it keeps."""

import pytest
import torch
from conftest import contract_masks, relative_error
from torch.nn import functional

from spark_me import sparse
from spark_me.sparse import depthwise

PATCH = 16  # 16 and 8 sites along a patch's side at strides 1 and 2: tiles; fewer: raster
STRIDES = [2, 4, 8, 16]


def maps(stride, channels=5, dtype=torch.float64):
    visible = contract_masks()
    side = PATCH // stride
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(len(visible), channels, 3 * side, 4 * side, dtype=torch.float64, generator=generator).to(dtype)
    return x, visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]


def random_layer(channels=5, kernel_size=7, dtype=torch.float64):
    layer = sparse.DepthwiseConv2d(channels, kernel_size).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    return layer


def dense_weight(layer):
    """[C, 1, k, k], offset by offset: MinkowskiEngine counts them with y varying fastest."""
    size = layer.kernel_size
    weight = layer.kernel.new_zeros(layer.kernel.shape[1], 1, size, size)
    for offset, of_channels in enumerate(layer.kernel.detach()):
        weight[:, 0, offset % size, offset // size] = of_channels
    return weight


def test_both_layouts_are_covered():
    pyramid = sparse.Pyramid(contract_masks(), PATCH, "fused")
    kinds = [type(depthwise._layout(pyramid, stride, 7)).__name__ for stride in STRIDES]
    assert kinds == ["_Tiles", "_Raster", "_Raster", "_Raster"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("stride", STRIDES)
def test_equals_the_dense_convolution_of_the_masked_map(stride, kernel_size, dtype, backend, assert_close):
    layer = random_layer(kernel_size=kernel_size, dtype=dtype)
    x, mask = maps(stride, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    pyramid = sparse.Pyramid(contract_masks(), PATCH, backend)
    actual = sparse.to_dense(layer(sparse.to_sparse(ours, pyramid, stride)))
    weight = dense_weight(layer).requires_grad_()
    bias = layer.bias.detach().flatten().requires_grad_()
    expected = functional.conv2d(theirs * mask, weight, bias, padding=kernel_size // 2, groups=5) * mask
    assert_close(actual, expected, "output")
    upstream = torch.randn(expected.shape, dtype=dtype)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")
    gradient = weight.grad[:, 0].permute(2, 1, 0).flatten(0, 1)
    assert_close(layer.kernel.grad, gradient, "kernel gradient")
    assert_close(layer.bias.grad.flatten(), bias.grad, "bias gradient")


@pytest.mark.parametrize("stride", [2, 8])
def test_gradcheck(stride):
    visible = torch.tensor([[[True, False], [True, True]], [[False, False], [False, True]]])
    pyramid = sparse.Pyramid(visible, PATCH, "fused")
    rows = torch.randn(pyramid.neighbours.sites(stride), 2, dtype=torch.float64, requires_grad=True)
    layer = random_layer(channels=2, kernel_size=3)
    layout = depthwise._layout(pyramid, stride, 3)
    assert torch.autograd.gradcheck(
        lambda *inputs: depthwise._DepthwiseConvolution.apply(*inputs, layout), (rows, layer.kernel, layer.bias)
    )


@pytest.mark.parametrize("stride", STRIDES)
def test_the_gpus_kernel_gradient_is_the_cpus(stride, assert_close):
    """Either runs on any device; the device decides which one is used."""
    layout = depthwise._layout(sparse.Pyramid(contract_masks(), PATCH, "fused"), stride, 7)
    x, _ = maps(stride)
    rows = sparse.to_sparse(x, sparse.Pyramid(contract_masks(), PATCH), stride).F
    images = layout.inputs(rows), layout.outputs(rows.flip(0))
    assert_close(depthwise._correlate_in_parts(*images, layout), depthwise._correlate(*images, layout))


@pytest.mark.parametrize("stride", [2, 4])
def test_backward_keeps_rows_and_kernel_only(stride):
    x, _ = maps(stride, channels=8, dtype=torch.float32)
    x = sparse.to_sparse(x, sparse.Pyramid(contract_masks(), PATCH, "fused"), stride)
    x.F.requires_grad_()
    layer = random_layer(channels=8, dtype=torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sorted(kept) == sorted([x.F.numel(), layer.kernel.numel()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [2, 4])
def test_autocast_computes_in_half_precision_near_the_float64_result(stride, dtype):
    layer = random_layer(kernel_size=3)
    pyramid = sparse.Pyramid(contract_masks(), PATCH, "fused")
    x, _ = maps(stride)
    results = []
    for autocast, kind in ((False, torch.float64), (True, torch.float32)):
        layer.to(kind).zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            out = layer(sparse.to_sparse(x.to(kind), pyramid, stride))
        assert out.F.dtype == (dtype if autocast else kind)
        out.F.float().square().mean().backward()
        results.append((out.F.detach().double(), layer.kernel.grad.double(), layer.bias.grad.double()))
    for exact, half in zip(*results):
        assert relative_error(half, exact) < 1e-2


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="odd, not 4"):
        sparse.DepthwiseConv2d(8, 4)


def test_linear_is_a_product_at_every_site(backend, assert_close):
    x, mask = maps(4)
    layer = sparse.Linear(5, 3).double()
    actual = sparse.to_dense(layer(sparse.to_sparse(x, sparse.Pyramid(contract_masks(), PATCH, backend), 4)))
    expected = torch.einsum("bchw,dc->bdhw", x, layer.weight) + layer.bias[:, None, None]
    assert_close(actual, expected * mask)
