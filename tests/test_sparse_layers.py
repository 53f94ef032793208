"""Batch norm of sparse tensors, residual sums and stochastic depth."""

import pytest
import torch
from conftest import contract_masks, dense_input, mask_at

from spark_me import sparse

PATCH = 8
DTYPES = [torch.float64, torch.float32]


def pyramid(backend="minkowski"):
    return sparse.Pyramid(contract_masks(), PATCH, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_sees_visible_sites_only(training, dtype, assert_close):
    ours, theirs = (dense_input(dtype).requires_grad_() for _ in range(2))
    layer = sparse.BatchNorm2d(5).to(dtype).train(training)
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


def test_add(assert_close):
    x, y = dense_input(torch.float64), dense_input(torch.float64).flip(1)
    one = pyramid()
    total = sparse.add(sparse.to_sparse(x, one), sparse.to_sparse(y, one))
    assert_close(sparse.to_dense(total), (x + y) * mask_at(contract_masks(), x.shape[2]))


def test_add_refuses_other_sites():
    x = dense_input(torch.float64)
    with pytest.raises(ValueError, match="different sites"):
        sparse.add(sparse.to_sparse(x, pyramid()), sparse.to_sparse(x, pyramid()))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
def test_drop_path_drops_whole_images_and_keeps_the_expectation(scale, per_image):
    x = sparse.to_sparse(torch.ones(6, 1, 24, 32, dtype=torch.float64), pyramid())
    layer = sparse.DropPath(0.4, scale, per_image)
    mask = mask_at(contract_masks(), 24)
    torch.manual_seed(0)
    outcomes = []
    for _ in range(300):
        dense = sparse.to_dense(layer(x))
        of_image = dense.flatten(1).amax(1)  # one factor per image, the same at all its sites
        assert torch.equal(dense, mask * of_image.view(-1, 1, 1, 1))
        outcomes.append(of_image)
    outcomes = torch.stack(outcomes)
    kept = 1 / 0.6 if scale else 1.0
    assert set(outcomes.unique().tolist()) == {0.0, kept}
    assert (outcomes.mean(0) - 0.6 * kept).abs().max() < 0.25  # each with its probability, five deviations
    together = (outcomes == outcomes[:, :1]).all()
    assert together if not per_image else not torch.equal(outcomes[:, 0], outcomes[:, 1])
    assert layer.eval()(x) is x
