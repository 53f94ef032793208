"""Each kernel of the native backend against dense torch and finite differences, and what it keeps in memory."""

from functools import partial

import masked_convolutions as reference
import pytest
import torch
from masked_convolutions import square_window

from spark_me import sparse
from spark_me.sparse import native
from spark_me.sparse.neighbours import Neighbours, VisiblePatches, Window

VISIBLE = torch.tensor([[[True, False], [True, True]], [[False, False], [False, True]]])
PATCH = 16  # 8 outputs along a patch's side at stride 2: tiles; fewer: pairs
# Rectangles, and kernels that start elsewhere than the engine's.
OTHERS = [
    Window(2, (1, 7), 1, (1, 1), (0, 3)),
    Window(4, (7, 1), 1, (1, 1), (3, 0)),
    Window(1, (3, 5), 2, (1, 2), (1, 4)),
    Window(1, (3, 3), 2, (1, 1), (0, 0)),
    Window(4, (3, 3), 2, (1, 1), (0, 0)),
    Window(1, (4, 4), 2, (1, 1), (1, 1)),
    Window(16, (2, 4), 1, (1, 1), (1, 2)),
    Window(4, (1, 1), 2, (1, 1), (-1, 1)),
    Window(4, (2, 2), 2, (1, 1), (-1, 0)),
    Window(8, (2, 2), 2, (1, 1), (0, 0)),
]


def rows(neighbours, stride, channels=2):
    return torch.randn(neighbours.sites(stride), channels, dtype=torch.float64, requires_grad=True)


def weight(window, outputs, inputs):
    """Channels last in memory, as encoders keep them."""
    noise = torch.randn(outputs, inputs, *window.size, dtype=torch.float64)
    return noise.contiguous(memory_format=torch.channels_last).requires_grad_()


def both_algorithms(window, neighbours, groups):
    """Also the one that the CPU would not take."""
    settings = window, neighbours, groups
    yield lambda x, w: native.convolution(x, w, *settings)
    yield lambda x, w: native._TileConvolution.apply(x, w, *settings)
    places = neighbours.sites(window.out_stride)
    yield lambda x, w: native._PairConvolution.apply(x, w, neighbours.pairs(window), places, groups)


@pytest.mark.parametrize("groups, channels", [(1, (4, 3)), (2, (4, 6)), (4, (4, 8))])
@pytest.mark.parametrize("window", [*OTHERS, square_window(1, 3, 2), square_window(4, 3, 1, 2), square_window(4, 2, 2)])
def test_every_algorithm_equals_dense_torch(window, groups, channels, assert_close):
    pyramid = sparse.Pyramid(VISIBLE, PATCH)
    inputs = rows(pyramid.neighbours, window.in_stride, channels[0]), weight(window, channels[1], channels[0] // groups)
    expected = reference.results(reference.convolution(*inputs, window, pyramid, groups), inputs)
    for convolution in both_algorithms(window, pyramid.neighbours, groups):
        for actual, wanted in zip(reference.results(convolution(*inputs), inputs), expected):
            assert_close(actual, wanted)


@pytest.mark.parametrize(
    "window",
    [
        square_window(2, 3, 1),
        square_window(1, 3, 2),
        square_window(4, 3, 1),
        square_window(4, 3, 2),
        square_window(8, 3, 2),
        square_window(8, 1, 2),
        square_window(2, 4, 4),
        *OTHERS,
    ],
)
def test_convolution_gradcheck(window):
    neighbours = Neighbours(VisiblePatches.of(VISIBLE), PATCH)
    assert torch.autograd.gradcheck(
        lambda x, w: native.convolution(x, w, window, neighbours),
        (rows(neighbours, window.in_stride), weight(window, 3, 2)),
        fast_mode=True,
    )


@pytest.mark.parametrize("groups, dilation", [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("settings", [(2, 3, 1), (1, 3, 2), (4, 3, 1), (16, 3, 1), (8, 1, 2), (2, 2, 2)])
def test_grouped_and_dilated_convolution_gradcheck(settings, groups, dilation):
    window, neighbours = square_window(*settings, dilation), Neighbours(VisiblePatches.of(VISIBLE), PATCH)
    assert torch.autograd.gradcheck(
        lambda x, w: native.convolution(x, w, window, neighbours, groups),
        (rows(neighbours, window.in_stride, 4), weight(window, 6, 4 // groups)),
        fast_mode=True,
    )


def test_convolution_to_raster_gradcheck():
    pyramid = sparse.Pyramid(VISIBLE, PATCH)
    inputs = rows(pyramid.neighbours, 8), weight(square_window(8, 3), 3, 2)
    assert torch.autograd.gradcheck(lambda x, w: native.convolution_to_raster(x, w, 8, pyramid), inputs, fast_mode=True)


POOLS = [native.max_pool, partial(native.max_pool, zero_padding=True), native.sum_pool]


@pytest.mark.parametrize("pool", POOLS, ids=["max", "max with zeros around", "sum"])
@pytest.mark.parametrize(
    "window",
    [
        square_window(2, 3, 2),
        square_window(2, 2, 2),
        square_window(2, 2, 4),
        square_window(16, 3, 1),
        square_window(2, 3, 2)._replace(before=(0, 0)),
        Window(4, (2, 5), 2, (1, 1), (0, 3)),
    ],
)
def test_pool_gradcheck(window, pool):
    neighbours = Neighbours(VisiblePatches.of(VISIBLE), PATCH)
    assert torch.autograd.gradcheck(
        lambda x: pool(x, window, neighbours), (rows(neighbours, window.in_stride),), fast_mode=True
    )


@pytest.mark.parametrize("stride", [2, 4])
def test_backward_keeps_rows_and_weight_only(stride):
    """No [N, K·C] buffer and no tile survives the forward pass."""
    pyramid = sparse.Pyramid(VISIBLE, PATCH, "native")
    x = sparse.to_sparse(torch.randn(2, 8, 32 // stride, 32 // stride), pyramid, stride)
    layer = sparse.Conv2d(8, 8, 3, padding=1, bias=False)
    kept: list[int] = []
    x.F.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sorted(kept) == sorted([x.F.numel(), layer.weight.numel()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision_near_the_float64_result(dtype):
    torch.manual_seed(0)
    images = torch.randn(2, 8, 16, 16)
    for stride in (2, 4):
        layer = sparse.Conv2d(8, 8, 3, padding=1, bias=False)
        torch.nn.init.normal_(layer.weight, std=0.1)
        dense = images[:, :, : 32 // stride, : 32 // stride]
        exact = layer.double()(sparse.to_sparse(dense.double(), sparse.Pyramid(VISIBLE, PATCH, "minkowski"), stride))
        layer.float()
        with torch.autocast("cpu", dtype=dtype):
            half = layer(sparse.to_sparse(dense, sparse.Pyramid(VISIBLE, PATCH, "native"), stride))
        assert half.F.dtype == dtype
        assert (half.F.double() - exact.F).abs().max() / exact.F.abs().max() < 1e-2
