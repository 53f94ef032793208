"""Each kernel of the fused backend against finite differences, and what it keeps in memory."""

import pytest
import torch

from spark_me import sparse
from spark_me.sparse import fused
from spark_me.sparse.neighbours import Neighbours, Window

VISIBLE = torch.tensor([[[True, False], [True, True]], [[False, False], [False, True]]])
PATCH = 16  # 8 outputs along a patch's side at stride 2: tiles; fewer: pairs


def rows(neighbours, stride, channels=2):
    return torch.randn(neighbours.sites(stride), channels, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "window",
    [
        Window(2, 3, 1),
        Window(1, 3, 2),
        Window(4, 3, 1),
        Window(4, 3, 2),
        Window(8, 3, 2),
        Window(8, 1, 2),
        Window(2, 4, 4),
    ],
)
def test_convolution_gradcheck(window):
    neighbours = Neighbours(VISIBLE, PATCH)
    kernel = torch.randn(window.kernel_size**2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, k: fused.convolution(x, k, window, neighbours), (rows(neighbours, window.in_stride), kernel),
        fast_mode=True,
    )  # fmt: skip


@pytest.mark.parametrize("groups, dilation", [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize(
    "window", [Window(2, 3, 1), Window(1, 3, 2), Window(4, 3, 1), Window(16, 3, 1), Window(8, 1, 2), Window(2, 2, 2)]
)
def test_grouped_and_dilated_convolution_gradcheck(window, groups, dilation):
    window = window._replace(dilation=dilation)
    neighbours = Neighbours(VISIBLE, PATCH)
    kernel = torch.randn(window.kernel_size**2, 4 // groups, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, k: fused.convolution(x, k, window, neighbours, groups),
        (rows(neighbours, window.in_stride, 4), kernel),
        fast_mode=True,
    )


def test_convolution_to_raster_gradcheck():
    pyramid = sparse.Pyramid(VISIBLE, PATCH)
    kernel = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = rows(pyramid.neighbours, 8), kernel
    assert torch.autograd.gradcheck(lambda x, k: fused.convolution_to_raster(x, k, 8, pyramid), inputs, fast_mode=True)


@pytest.mark.parametrize("pool", [fused.max_pool, fused.average_pool])
@pytest.mark.parametrize("window", [Window(2, 3, 2), Window(2, 2, 2), Window(2, 2, 4), Window(16, 3, 1)])
def test_pool_gradcheck(window, pool):
    neighbours = Neighbours(VISIBLE, PATCH)
    assert torch.autograd.gradcheck(
        lambda x: pool(x, window, neighbours), (rows(neighbours, window.in_stride),), fast_mode=True
    )


@pytest.mark.parametrize("stride", [2, 4])
def test_backward_keeps_rows_and_kernel_only(stride):
    """No [N, K·C] buffer and no tile survives the forward pass."""
    pyramid = sparse.Pyramid(VISIBLE, PATCH, "fused")
    x = sparse.to_sparse(torch.randn(2, 8, 32 // stride, 32 // stride), pyramid, stride)
    layer = sparse.Conv2d(8, 8, 3)
    kept: list[int] = []
    x.F.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sorted(kept) == sorted([x.F.numel(), layer.kernel.numel()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision_near_the_float64_result(dtype):
    torch.manual_seed(0)
    images = torch.randn(2, 8, 16, 16)
    for stride in (2, 4):
        layer = sparse.Conv2d(8, 8, 3)
        torch.nn.init.normal_(layer.kernel, std=0.1)
        dense = images[:, :, : 32 // stride, : 32 // stride]
        exact = layer.double()(sparse.to_sparse(dense.double(), sparse.Pyramid(VISIBLE, PATCH, "minkowski"), stride))
        layer.float()
        with torch.autocast("cpu", dtype=dtype):
            half = layer(sparse.to_sparse(dense, sparse.Pyramid(VISIBLE, PATCH, "fused"), stride))
        assert half.F.dtype == dtype
        assert (half.F.double() - exact.F).abs().max() / exact.F.abs().max() < 1e-2
