"""Each sparse layer against dense torch on masked maps, or a loop over sites (DESIGN §6)."""

import itertools

import pytest
import torch
from conftest import contract_masks
from torch.nn import functional

from spark_me import sparse
from spark_me.weights.kernels import kernel_to_weight

PATCH = 8
DTYPES = [torch.float64, torch.float32]


def dense_input(dtype, channels=5, side=PATCH):
    visible = contract_masks()
    generator = torch.Generator().manual_seed(11)
    return torch.randn(len(visible), channels, 3 * side, 4 * side, dtype=torch.float64, generator=generator).to(dtype)


def mask_at(visible, height):
    side = height // visible.shape[1]
    return visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]


def pyramid(backend="minkowski"):
    return sparse.Pyramid(contract_masks(), PATCH, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kernel_size, stride", [(1, 1), (3, 1), (5, 1), (7, 1), (1, 2), (2, 2), (3, 2), (7, 2), (4, 4)]
)
def test_convolution(kernel_size, stride, bias, dtype, backend, assert_close):
    layer = sparse.Conv2d(5, 7, kernel_size, stride, bias=bias).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    ours, theirs = (dense_input(dtype).requires_grad_() for _ in range(2))
    weight = kernel_to_weight(layer.kernel.detach(), kernel_size).requires_grad_()
    constant = layer.bias.detach().flatten().requires_grad_() if bias else None

    actual = sparse.to_dense(layer(sparse.to_sparse(ours, pyramid(backend))))
    visible = contract_masks()
    padding = kernel_size // 2 if kernel_size % 2 else 0
    expected = functional.conv2d(theirs * mask_at(visible, theirs.shape[2]), weight, constant, stride, padding)
    expected = expected * mask_at(visible, expected.shape[2])
    assert_close(actual, expected, "output")

    upstream = torch.randn(expected.shape, dtype=dtype)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")
    assert_close(kernel_to_weight(layer.kernel.grad, kernel_size), weight.grad, "kernel gradient")
    if bias:
        assert_close(layer.bias.grad.flatten(), constant.grad, "bias gradient")


@pytest.mark.parametrize("groups, dilation", [(3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("side, stride", [(16, 2), (8, 1), (8, 2), (4, 1), (4, 2), (2, 1), (2, 2), (1, 1)])
def test_grouped_and_dilated_convolution(side, stride, kernel_size, groups, dilation, backend, assert_close):
    """`side` is the number of input sites along a patch's side: both formulations of the fused backend take part."""
    layer = sparse.Conv2d(6, 12, kernel_size, stride, groups, dilation, bias=True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    ours, theirs = (dense_input(torch.float64, 6, side).requires_grad_() for _ in range(2))
    weight = kernel_to_weight(layer.kernel.detach(), kernel_size).requires_grad_()
    assert weight.shape == (12, 6 // groups, kernel_size, kernel_size)
    constant = layer.bias.detach().flatten().requires_grad_()

    visible = contract_masks()
    sites = sparse.to_sparse(ours, sparse.Pyramid(visible, 16, backend), 16 // side)
    actual = sparse.to_dense(layer(sites))
    before = dilation * (kernel_size // 2) if kernel_size % 2 else 0
    after = dilation * (kernel_size - 1)  # more than is read: rows beyond the border are cropped with the output
    padded = functional.pad(theirs * mask_at(visible, theirs.shape[2]), (before, after, before, after))
    expected = functional.conv2d(padded, weight, constant, stride, 0, dilation, groups)
    expected = expected[:, :, : actual.shape[2], : actual.shape[3]]
    expected = expected * mask_at(visible, expected.shape[2])
    assert_close(actual, expected, "output")

    upstream = torch.randn(expected.shape, dtype=torch.float64)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")
    assert_close(kernel_to_weight(layer.kernel.grad, kernel_size), weight.grad, "kernel gradient")
    assert_close(layer.bias.grad.flatten(), constant.grad, "bias gradient")


def test_a_grouped_convolution_starts_as_torchs_does():
    layer = sparse.Conv2d(8, 6, 3, groups=2, bias=True)
    bound = (9 * 4) ** -0.5
    assert 0.9 * bound < layer.kernel.abs().max() <= bound
    assert layer.bias.abs().max() <= bound
    assert layer.in_channels == 8


@pytest.mark.parametrize("groups, dilation", [(2, 1), (0, 1), (1, 0)])
def test_convolution_refuses_impossible_settings(groups, dilation):
    with pytest.raises(ValueError, match=r"^(groups=|dilation must)"):
        sparse.Conv2d(5, 6, 3, groups=groups, dilation=dilation)


def windows(x, kernel_size, stride):
    """For every output site of every image: (output place, the visible input sites under the kernel)."""
    visible = mask_at(contract_masks(), x.shape[2])[:, 0]
    before = kernel_size // 2 if kernel_size % 2 else 0
    for image, y, x_ in itertools.product(range(len(x)), range(0, x.shape[2], stride), range(0, x.shape[3], stride)):
        if not visible[image, y, x_]:
            continue
        rows = range(max(0, y - before), min(x.shape[2], y - before + kernel_size))
        columns = range(max(0, x_ - before), min(x.shape[3], x_ - before + kernel_size))
        yield (
            (image, y // stride, x_ // stride),
            [(image, row, column) for row in rows for column in columns if visible[image, row, column]],
        )


@pytest.mark.parametrize("layer_class, reduce", [(sparse.MaxPool2d, torch.amax), (sparse.AvgPool2d, torch.mean)])
@pytest.mark.parametrize(
    "side, kernel_size, stride",
    # kernels that overlap, touch, leave sites out, and reach over several patches
    [(8, 3, 2), (8, 2, 2), (8, 2, 4), (4, 3, 1), (2, 3, 2), (2, 5, 1), (1, 3, 1), (1, 5, 1)],
)
def test_pooling_ignores_empty_sites(layer_class, reduce, side, kernel_size, stride, backend, assert_close):
    ours, theirs = (dense_input(torch.float64, 2, side).requires_grad_() for _ in range(2))
    sites = sparse.to_sparse(ours, pyramid(backend), PATCH // side)
    actual = sparse.to_dense(layer_class(kernel_size, stride)(sites))
    expected = torch.zeros_like(actual)
    for (image, y, x), sites in windows(theirs, kernel_size, stride):
        values = torch.stack([theirs[i, :, row, column] for i, row, column in sites])
        expected[image, :, y, x] = reduce(values, dim=0)
    assert_close(actual, expected, "output")
    upstream = torch.randn_like(expected)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")


def test_max_pool_of_negative_features_never_takes_an_empty_site(backend):
    dense = -1 - dense_input(torch.float64).abs()
    pooled = sparse.MaxPool2d(3, 2)(sparse.to_sparse(dense, pyramid(backend)))
    assert pooled.F.max() <= -1
    # the dense simulation fills empty sites with zero, which wins over every negative feature beside it
    simulated = functional.max_pool2d(dense * mask_at(contract_masks(), dense.shape[2]), 3, 2, padding=1)
    assert (simulated * mask_at(contract_masks(), simulated.shape[2])).max() == 0 > pooled.F.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_sees_visible_sites_only(training, dtype, assert_close):
    ours, theirs = (dense_input(dtype).requires_grad_() for _ in range(2))
    layer = sparse.BatchNorm(5).to(dtype).train(training)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    mean, variance = layer.running_mean.clone(), layer.running_var.clone()
    actual = sparse.to_dense(layer(sparse.to_sparse(ours, pyramid())))

    mask = mask_at(contract_masks(), theirs.shape[2])[:, 0]
    rows = theirs.permute(0, 2, 3, 1)[mask]
    batch_mean, batch_variance = rows.mean(0), (rows - rows.mean(0)).square().mean(0)
    used_mean, used_variance = (batch_mean, batch_variance) if training else (mean, variance)
    normalised = (theirs - used_mean[:, None, None]) / (used_variance[:, None, None] + layer.eps).sqrt()
    expected = normalised * layer.weight.detach()[:, None, None] + layer.bias.detach()[:, None, None]
    expected = expected * mask[:, None]
    assert_close(actual, expected, "output")
    if training:
        unbiased = batch_variance * len(rows) / (len(rows) - 1)
        assert_close(layer.running_mean, mean * 0.9 + batch_mean * 0.1, "running mean")
        assert_close(layer.running_var, variance * 0.9 + unbiased * 0.1, "running variance")
    upstream = torch.randn(expected.shape, dtype=dtype)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")


def test_relu_and_add(assert_close):
    x, y = dense_input(torch.float64), dense_input(torch.float64).flip(1)
    one = pyramid()
    total = sparse.add(sparse.ReLU()(sparse.to_sparse(x, one)), sparse.to_sparse(y, one))
    mask = mask_at(contract_masks(), x.shape[2])
    assert_close(sparse.to_dense(total), (x.clamp(min=0) + y) * mask)


def test_add_refuses_other_sites():
    x = dense_input(torch.float64)
    with pytest.raises(ValueError, match="different sites"):
        sparse.add(sparse.to_sparse(x, pyramid()), sparse.to_sparse(x, pyramid()))


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    x = sparse.to_sparse(torch.ones(6, 1, 24, 32, dtype=torch.float64), pyramid())
    layer = sparse.DropPath(0.4)
    mask = mask_at(contract_masks(), 24)
    torch.manual_seed(0)
    outcomes = []
    for _ in range(300):
        dense = sparse.to_dense(layer(x))
        of_image = dense.flatten(1).amax(1)  # one factor per image, the same at all its sites
        assert torch.equal(dense, mask * of_image.view(-1, 1, 1, 1))
        outcomes.append(of_image)
    outcomes = torch.stack(outcomes)
    assert set(outcomes.unique().tolist()) == {0.0, 1 / 0.6}
    assert (outcomes.mean(0) - 1).abs().max() < 0.25  # images are dropped independently, five deviations
    assert not torch.equal(outcomes[:, 0], outcomes[:, 1])
    assert layer.eval()(x) is x
