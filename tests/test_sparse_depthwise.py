"""Depthwise convolution against dense torch on masked maps, against finite differences, and what it keeps."""

import pytest
import torch
from conftest import contract_masks, relative_error
from masked_convolutions import square_window
from torch.nn import functional

from spark_me import sparse
from spark_me.sparse import depthwise
from spark_me.sparse.neighbours import Window

PATCH = 16  # 16 and 8 sites along a patch's side at strides 1 and 2: tiles; fewer: raster
STRIDES = [2, 4, 8, 16]


def maps(stride, channels=5, dtype=torch.float64):
    visible = contract_masks()
    side = PATCH // stride
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(len(visible), channels, 3 * side, 4 * side, dtype=torch.float64, generator=generator).to(dtype)
    return x, visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]


def random_layer(channels=5, size=7, dtype=torch.float64, **options):
    """A depthwise convolution, of a multiple of the channels where `out_channels` says so."""
    outputs = options.pop("out_channels", channels)
    height, width = (size, size) if isinstance(size, int) else size
    options.setdefault("padding", (height // 2, width // 2))
    layer = sparse.Conv2d(channels, outputs, size, groups=channels, **options).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    return layer


def test_both_layouts_are_covered():
    pyramid = sparse.Pyramid(contract_masks(), PATCH, "native")
    kinds = [type(depthwise._layout(pyramid, square_window(stride, 7))).__name__ for stride in STRIDES]
    assert kinds == ["_Tiles", "_Raster", "_Raster", "_Raster"]


def compare(layer, stride, backend, assert_close, padding=None):
    """Outputs and gradients against dense torch; `padding` is (left, right, top, bottom) of the dense map."""
    channels, dtype = layer.in_channels, layer.weight.dtype
    x, mask = maps(stride, channels, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    pyramid = sparse.Pyramid(contract_masks(), PATCH, backend)
    actual = sparse.to_dense(layer(sparse.to_sparse(ours, pyramid, stride)))
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in layer.parameters())
    if padding is None:
        down, across = layer.padding
        padding = [across, across, down, down]
    padded = functional.pad(theirs * mask, padding)
    expected = functional.conv2d(padded, weight, bias, layer.stride, 0, layer.dilation, channels)
    expected = expected * mask[:, :, :: layer.stride[0], :: layer.stride[1]]
    assert_close(actual, expected, "output")
    upstream = torch.randn(expected.shape, dtype=dtype)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")
    assert_close(layer.weight.grad, weight.grad, "weight gradient")
    assert_close(layer.bias.grad, bias.grad, "bias gradient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("stride", STRIDES)
def test_equals_the_dense_convolution_of_the_masked_map(stride, size, dtype, backend, assert_close):
    compare(random_layer(size=size, dtype=dtype), stride, backend, assert_close)


@pytest.mark.parametrize("stride", [2, 8])
@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 11), (3, 5)])
def test_rectangular_kernels(size, stride, backend, assert_close):
    layer = random_layer(size=size)
    window = layer.window(stride)
    assert depthwise.takes(layer.weight, window, 5)
    compare(layer, stride, backend, assert_close)


@pytest.mark.parametrize("stride", [2, 8])
@pytest.mark.parametrize(
    "options, padding",
    [
        ({"size": 3, "stride": 2}, None),
        ({"size": 7, "stride": 2}, None),
        ({"size": 3, "dilation": 2, "padding": 2}, None),
        ({"size": (3, 1), "dilation": (3, 1), "padding": (3, 0)}, None),
        ({"size": 3, "stride": 2, "dilation": 2, "padding": 2}, None),
        ({"size": 3, "out_channels": 15}, None),  # three outputs of every channel
        ({"size": 5, "stride": 2, "out_channels": 10}, None),
        ({"size": 4, "padding": "same"}, (1, 2, 1, 2)),
        ({"size": (2, 3), "padding": "same"}, (1, 1, 0, 1)),
        ({"size": 4, "stride": 2, "padding": 1}, None),
        ({"size": 1, "padding": 0, "out_channels": 10}, None),
    ],
    ids=str,
)
def test_strides_dilation_multiples_and_kernels_that_start_elsewhere(options, padding, stride, backend, assert_close):
    compare(random_layer(**options), stride, backend, assert_close, padding)


@pytest.mark.parametrize("size, dilation", [((3, 3), (1, 1)), ((1, 5), (1, 1)), ((3, 3), (2, 1))])
@pytest.mark.parametrize("stride", [2, 8])
def test_gradcheck(stride, size, dilation):
    visible = torch.tensor([[[True, False], [True, True]], [[False, False], [False, True]]])
    pyramid = sparse.Pyramid(visible, PATCH, "native")
    rows = torch.randn(pyramid.neighbours.sites(stride), 2, dtype=torch.float64, requires_grad=True)
    padding = tuple(step * (each // 2) for each, step in zip(size, dilation))
    layer = random_layer(channels=2, size=size, dilation=dilation, padding=padding)
    window = layer.window(stride)
    assert depthwise.takes(layer.weight, window, 2)
    for layout in (depthwise._Tiles(pyramid.neighbours, window), depthwise._Raster(pyramid, window)):
        assert torch.autograd.gradcheck(
            lambda *inputs, layout=layout: depthwise._DepthwiseConvolution.apply(*inputs, layout),
            (rows, layer.weight, layer.bias),
            fast_mode=True,
        )


@pytest.mark.parametrize("size, dilation", [((7, 7), (1, 1)), ((3, 5), (1, 1)), ((3, 3), (1, 2))])
@pytest.mark.parametrize("stride", STRIDES)
def test_the_gpus_kernel_gradient_is_the_cpus(stride, size, dilation, assert_close):
    """Either runs on any device; the device decides which one is used."""
    window = Window(stride, size, 1, dilation, (0, 0)).in_engine
    layout = depthwise._layout(sparse.Pyramid(contract_masks(), PATCH, "native"), window)
    x, _ = maps(stride)
    rows = sparse.to_sparse(x, sparse.Pyramid(contract_masks(), PATCH), stride).F
    images = layout.inputs(rows), layout.outputs(rows.flip(0))
    assert_close(depthwise._correlate_in_parts(*images, layout), depthwise._correlate(*images, layout))


@pytest.mark.parametrize("stride", [2, 4])
def test_backward_keeps_rows_and_weight_only(stride):
    x, _ = maps(stride, channels=8, dtype=torch.float32)
    x = sparse.to_sparse(x, sparse.Pyramid(contract_masks(), PATCH, "native"), stride)
    x.F.requires_grad_()
    layer = random_layer(channels=8, dtype=torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sorted(kept) == sorted([x.F.numel(), layer.weight.numel()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [2, 4])
def test_autocast_computes_in_half_precision_near_the_float64_result(stride, dtype):
    layer = random_layer(size=3)
    pyramid = sparse.Pyramid(contract_masks(), PATCH, "native")
    x, _ = maps(stride)
    results = []
    for autocast, kind in ((False, torch.float64), (True, torch.float32)):
        layer.to(kind).zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            out = layer(sparse.to_sparse(x.to(kind), pyramid, stride))
        assert out.F.dtype == (dtype if autocast else kind)
        out.F.float().square().mean().backward()
        results.append((out.F.detach().double(), layer.weight.grad.double(), layer.bias.grad.double()))
    for exact, half in zip(*results):
        assert relative_error(half, exact) < 1e-2
