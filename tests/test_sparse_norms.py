"""Norms of sparse tensors against a gather loop over images, and against dense modules when all is visible."""

import pytest
import timm.layers.grn
import torch
from conftest import randomise
from torch import nn

from spark_me import sparse
from spark_me.sparse.norms import _GlobalResponseNorm

PATCH = 8


def dense_input(visible, stride, channels=6):
    side = PATCH // stride
    generator = torch.Generator().manual_seed(11)
    shape = (len(visible), channels, visible.shape[1] * side, visible.shape[2] * side)
    # Images of different scale: statistics pooled over the batch would be far off.
    scale = torch.arange(1, len(visible) + 1).view(-1, 1, 1, 1)
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).requires_grad_()


def gather(dense, visible, image):
    """Rows [n, C] of one image's visible sites, and their mask [h, w]."""
    side = dense.shape[2] // visible.shape[1]
    mask = visible[image].repeat_interleave(side, 0).repeat_interleave(side, 1)
    return dense[image].permute(1, 2, 0)[mask], mask


def per_image(dense, visible, normalise):
    """Apply `normalise` to each image's visible rows alone, back in a dense map that is zero elsewhere."""
    maps = []
    for image in range(len(visible)):
        rows, mask = gather(dense, visible, image)
        out = torch.zeros(*mask.shape, rows.shape[1], dtype=rows.dtype)
        out[mask] = normalise(rows)
        maps.append(out.permute(2, 0, 1))
    return torch.stack(maps)


def compare(layer, normalise, visible, stride, assert_close, backend="native"):
    """Outputs, input gradients and parameter gradients of `layer` and of `normalise` on each image's rows."""
    ours, theirs = (dense_input(visible, stride) for _ in range(2))
    actual = sparse.to_dense(layer(sparse.to_sparse(ours, sparse.Pyramid(visible, PATCH, backend), stride)))
    expected = per_image(theirs, visible, normalise)
    assert_close(actual, expected, "output")
    upstream = torch.randn_like(expected)
    parameters = list(layer.parameters())
    ours_gradients = torch.autograd.grad(actual, [ours, *parameters], upstream)
    theirs_gradients = torch.autograd.grad(expected, [theirs, *parameters], upstream)
    for name, got, wanted in zip(
        ["input", *dict(layer.named_parameters())], ours_gradients, theirs_gradients, strict=True
    ):
        assert_close(got, wanted, f"gradient of {name}")


def response_norm(rows, gamma, beta):
    norm = rows.square().sum(0).sqrt()
    return gamma * (rows * norm / (norm.mean() + 1e-6)) + beta + rows


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_global_response_norm_is_per_image(stride, visible, backend, assert_close):
    layer = randomise(sparse.GlobalResponseNorm(6).double())
    compare(layer, lambda rows: response_norm(rows, layer.weight, layer.bias), visible, stride, assert_close, backend)


def test_pooling_the_response_over_the_batch_would_be_noticed(visible, assert_close):
    layer = randomise(sparse.GlobalResponseNorm(6).double())
    dense = dense_input(visible, 4).detach()
    everything = torch.cat([gather(dense, visible, image)[0] for image in range(len(visible))])
    pooled = everything.square().sum(0).sqrt()

    def pool_over_batch(rows):
        return layer.weight * rows * pooled / (pooled.mean() + 1e-6) + layer.bias + rows

    with pytest.raises(AssertionError, match="output"):
        compare(layer, pool_over_batch, visible, 4, assert_close)


def test_global_response_norm_equals_timms_when_all_is_visible(assert_close):
    visible = torch.ones(2, 3, 4, dtype=torch.bool)
    layer = randomise(sparse.GlobalResponseNorm(6).double())
    dense_layer = timm.layers.grn.GlobalResponseNorm(6, channels_last=False).double()
    dense_layer.load_state_dict(layer.state_dict())
    x, theirs = dense_input(visible, 4), dense_input(visible, 4)
    with torch.no_grad():
        x[1, 2] = theirs[1, 2] = 0  # a channel that is zero in one image: the gradient of its norm must be finite
    actual = sparse.to_dense(layer(sparse.to_sparse(x, sparse.Pyramid(visible, PATCH), 4)))
    expected = dense_layer(theirs)
    assert_close(actual, expected, "output")
    upstream = torch.randn_like(expected)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(x.grad, theirs.grad, "input gradient")
    assert_close(layer.weight.grad, dense_layer.weight.grad, "gradient of gamma")
    assert_close(layer.bias.grad, dense_layer.bias.grad, "gradient of beta")


def test_global_response_norm_gradcheck(visible):
    pyramid = sparse.Pyramid(visible[1:5], PATCH)
    rows = torch.randn(pyramid.neighbours.sites(4), 3, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: _GlobalResponseNorm.apply(*x, pyramid, 4), (rows, gamma, beta))


def test_global_response_norm_keeps_its_input_only(visible):
    layer = sparse.GlobalResponseNorm(6)
    x = sparse.to_sparse(dense_input(visible, 2).float(), sparse.Pyramid(visible, PATCH), 2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sorted(kept) == [6, 6 * len(visible), x.F.numel()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_global_response_norm_keeps_half_precision_and_computes_statistics_in_float32(dtype, visible):
    layer = randomise(sparse.GlobalResponseNorm(6))
    exact = dense_input(visible, 2).detach() * 200  # squares exceed the range of float16
    pyramid = sparse.Pyramid(visible, PATCH)
    half = sparse.to_sparse(exact.to(dtype), pyramid, 2)
    half.F.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        actual = layer(half)
    assert actual.F.dtype == dtype
    expected = layer.double()(sparse.to_sparse(exact, pyramid, 2))
    assert (actual.F.double() - expected.F).abs().max() / expected.F.abs().max() < 1e-2
    actual.F.sum().backward()
    assert half.F.grad.isfinite().all() and half.F.grad.dtype == dtype


def test_layer_norm_is_per_site(visible, assert_close):
    layer = randomise(sparse.LayerNorm(6, eps=1e-3).double())

    def normalise(rows):
        centred = rows - rows.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-3).sqrt() * layer.weight + layer.bias

    compare(layer, normalise, visible, 4, assert_close)


def group_norm(rows, groups, layer):
    grouped = rows.view(len(rows), groups, -1)
    mean = grouped.mean((0, 2), keepdim=True)
    variance = (grouped - mean).square().mean((0, 2), keepdim=True)
    normalised = ((grouped - mean) / (variance + layer.eps).sqrt()).view_as(rows)
    return normalised if layer.weight is None else normalised * layer.weight + layer.bias


@pytest.mark.parametrize("stride", [2, 8])
@pytest.mark.parametrize(
    "layer, groups",
    [
        (sparse.GroupNorm(2, 6), 2),
        (sparse.GroupNorm(1, 6, eps=1e-3), 1),
        (sparse.GroupNorm(3, 6, affine=False), 3),
        (sparse.InstanceNorm2d(6, affine=True), 6),
        (sparse.InstanceNorm2d(6), 6),
    ],
    ids=repr,
)
def test_group_and_instance_norm_are_per_image(layer, groups, stride, visible, backend, assert_close):
    randomise(layer.double())
    compare(layer, lambda rows: group_norm(rows, groups, layer), visible, stride, assert_close, backend)


@pytest.mark.parametrize(
    "layer, dense_layer",
    [
        (sparse.GroupNorm(2, 6), nn.GroupNorm(2, 6)),
        (sparse.InstanceNorm2d(6, affine=True), nn.InstanceNorm2d(6, affine=True)),
        (sparse.InstanceNorm2d(6), nn.InstanceNorm2d(6)),
    ],
    ids=repr,
)
def test_group_and_instance_norm_equal_torchs_when_all_is_visible(layer, dense_layer, assert_close):
    visible = torch.ones(2, 3, 4, dtype=torch.bool)
    dense_layer.double().load_state_dict(randomise(layer.double()).state_dict())
    ours, theirs = (dense_input(visible, 4) for _ in range(2))
    actual = sparse.to_dense(layer(sparse.to_sparse(ours, sparse.Pyramid(visible, PATCH), 4)))
    expected = dense_layer(theirs)
    assert_close(actual, expected, "output")
    upstream = torch.randn_like(expected)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")


def test_a_large_mean_does_not_cancel(visible, assert_close):
    dense = dense_input(visible, 2).detach()
    pyramid = sparse.Pyramid(visible, PATCH)
    layer = sparse.GroupNorm(2, 6)
    expected = layer.double()(sparse.to_sparse(dense, pyramid, 2)).F
    shifted = layer.float()(sparse.to_sparse((dense + 3000).float(), pyramid, 2)).F
    assert (shifted.double() - expected).abs().max() < 5e-3


def test_group_norm_keeps_half_precision(visible):
    half = sparse.to_sparse(dense_input(visible, 2).bfloat16(), sparse.Pyramid(visible, PATCH), 2)
    assert sparse.GroupNorm(2, 6)(half).F.dtype == torch.bfloat16
