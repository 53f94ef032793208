"""Sparse pooling against loops over sites, and against torch's own where all is visible."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import contract_masks, dense_input, mask_at
from torch import nn
from torch.nn import functional

from spark_me import sparse
from spark_me.errors import EngineError

PATCH = 8


def pyramid(backend="minkowski"):
    return sparse.Pyramid(contract_masks(), PATCH, backend)


def windows(x, size, stride=1, before=(0, 0), dilation=1):
    """For every output site of every image: (output place, places under the kernel, which may lie beyond the map)."""
    visible = mask_at(contract_masks(), x.shape[2])[:, 0]
    for image, y, x_ in itertools.product(range(len(x)), range(0, x.shape[2], stride), range(0, x.shape[3], stride)):
        if visible[image, y, x_]:
            rows = [y - before[0] + dilation * step for step in range(size[0])]
            columns = [x_ - before[1] + dilation * step for step in range(size[1])]
            yield (image, y // stride, x_ // stride), list(itertools.product(rows, columns))


def pooled(x, reduce, **options):
    """`reduce` of what is under the kernel: visible values [n, C], and the places beyond the map."""
    stride = options.get("stride", 1)
    visible = mask_at(contract_masks(), x.shape[2])[:, 0]
    out = torch.zeros(*x.shape[:2], x.shape[2] // stride, x.shape[3] // stride, dtype=x.dtype)
    for (image, y, x_), places in windows(x, **options):
        inside = [(row, column) for row, column in places if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]]
        values = [x[image, :, row, column] for row, column in inside if visible[image, row, column]]
        beyond = [place for place in places if place not in inside]
        out[image, :, y, x_] = reduce(SimpleNamespace(values=torch.stack(values), beyond=beyond))
    return out


def compare_pooling(layer, backend, assert_close, side, reduce, **options):
    ours, theirs = (dense_input(torch.float64, 2, side).requires_grad_() for _ in range(2))
    layer.check()
    sites = sparse.to_sparse(ours, pyramid(backend), PATCH // side)
    if backend == "minkowski" and (window := layer.window(1)) != window.in_engine:
        with pytest.raises(EngineError, match="MinkowskiEngine has no pooling of .* use the backend native"):
            layer(sites)
        return
    actual = sparse.to_dense(layer(sites))
    expected = pooled(theirs, reduce, **options)
    assert_close(actual, expected, "output")
    upstream = torch.randn_like(expected)
    actual.backward(upstream)
    expected.backward(upstream)
    assert_close(ours.grad, theirs.grad, "input gradient")


@pytest.mark.parametrize("kind, reduce", [(sparse.MaxPool2d, torch.amax), (sparse.AvgPool2d, torch.mean)])
@pytest.mark.parametrize(
    "side, size, stride",
    # kernels that overlap, touch, leave sites out, and reach over several patches
    [(8, 3, 2), (8, 2, 2), (8, 2, 4), (4, 3, 1), (2, 3, 2), (2, 5, 1), (1, 3, 1), (1, 5, 1)],
)
def test_pooling_ignores_empty_sites(kind, reduce, side, size, stride, backend, assert_close):
    padding = size // 2 if size % 2 else 0
    layer = kind(size, stride, padding, **({"count_include_pad": False} if kind is sparse.AvgPool2d else {}))
    compare_pooling(
        layer, backend, assert_close, side, lambda under: reduce(under.values, dim=0),
        size=(size, size), stride=stride, before=(padding, padding),
    )  # fmt: skip


MAX_POOLS = [
    ({"kernel_size": 3, "stride": 2, "ceil_mode": True}, {"size": (3, 3), "stride": 2}),
    ({"kernel_size": 2, "stride": 2}, {"size": (2, 2), "stride": 2}),
    ({"kernel_size": 4, "stride": 2, "padding": 1}, {"size": (4, 4), "stride": 2, "before": (1, 1)}),
    ({"kernel_size": (3, 2), "stride": 2, "padding": (1, 0)}, {"size": (3, 2), "stride": 2, "before": (1, 0)}),
    ({"kernel_size": (1, 5), "stride": 1, "padding": (0, 2)}, {"size": (1, 5), "before": (0, 2)}),
    ({"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2}, {"size": (3, 3), "before": (2, 2), "dilation": 2}),
    ({"kernel_size": 5, "stride": 2, "padding": 1, "ceil_mode": True}, {"size": (5, 5), "stride": 2, "before": (1, 1)}),
]
"""torch's arguments, and the places under the kernel."""


@pytest.mark.parametrize("side", [8, 2])
@pytest.mark.parametrize("arguments, window", MAX_POOLS, ids=lambda options: str([*options.values()]))
def test_max_pooling_wherever_the_kernel_lies(arguments, window, side, backend, assert_close):
    layer = sparse.MaxPool2d(**arguments)
    compare_pooling(layer, backend, assert_close, side, lambda under: under.values.amax(dim=0), **window)


@pytest.mark.parametrize("side", [8, 2])
@pytest.mark.parametrize(
    "size, around, before",
    [((3, 3), ((0, 0), (1, 1)), (0, 0)), ((3, 3), ((1, 1), (1, 1)), (1, 1)), ((2, 3), ((0, 1), (0, 0)), (0, 1))],
)
def test_zeros_around_the_map_count_in_max_pooling_and_hidden_ones_do_not(size, around, before, side, assert_close):
    layer = sparse.MaxPool2d(size, 2)
    layer.around = around

    def reduce(under):
        largest = (under.values - 2).amax(dim=0)  # negative, as a rule
        return largest.clamp(min=0) if under.beyond else largest

    x = dense_input(torch.float64, 2, side)
    actual = sparse.to_dense(layer(sparse.to_sparse(x - 2, pyramid("native"), PATCH // side)))
    expected = pooled(x, reduce, size=size, stride=2, before=before)
    assert ((expected == 0) & mask_at(contract_masks(), expected.shape[2])).any() and (expected < 0).any()
    assert_close(actual, expected)
    with pytest.raises(EngineError, match="no pooling of a map that is padded: use the backend native"):
        layer(sparse.to_sparse(x, pyramid("minkowski"), PATCH // side))


def test_zeros_around_the_map_and_their_gradient(assert_close):
    layer = sparse.MaxPool2d(3, 2)
    layer.around = (0, 0), (1, 1)

    def reduce(under):
        largest = under.values.amax(dim=0)
        return torch.where(largest > 0, largest, 0) if under.beyond else largest

    compare_pooling(layer, "native", assert_close, 4, reduce, size=(3, 3), stride=2)


def divided(padding, x, include, divisor=None):
    """Mean as torch divides: by the visible sites, and places of padding where they count; none behind the padding."""
    (near_y, near_x), (far_y, far_x) = padding

    def reduce(under):
        counted = [
            (row, column)
            for row, column in under.beyond
            if -near_y <= row < x.shape[2] + far_y and -near_x <= column < x.shape[3] + far_x
        ]
        number = len(under.values) + (len(counted) if include else 0)
        return under.values.sum(dim=0) / (divisor or number)

    return reduce


AVERAGES = [
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 5, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": (1, 5), "stride": 1, "padding": (0, 2)},
    {"kernel_size": 2, "stride": 2},
]


@pytest.mark.parametrize("divisor", [None, 7])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("arguments", AVERAGES, ids=lambda options: str([*options.values()]))
def test_average_pooling_divides_as_torch_does(arguments, include, divisor, backend, assert_close):
    layer = sparse.AvgPool2d(**arguments, count_include_pad=include, divisor_override=divisor)
    geometry = layer.window(1)
    size, before, x = geometry.size, geometry.before, dense_input(torch.float64, 2, 4)
    reduce = divided((before, before), x, include, divisor)
    compare_pooling(layer, backend, assert_close, 4, reduce, size=size, stride=geometry.stride, before=before)
    if backend == "minkowski" and geometry != geometry.in_engine:
        return
    # where all is visible, it is torch's own
    whole = sparse.Pyramid(torch.ones_like(contract_masks()), PATCH, backend)
    reference = nn.AvgPool2d(**arguments, count_include_pad=include, divisor_override=divisor)
    assert_close(sparse.to_dense(layer(sparse.to_sparse(x, whole, 2))), reference(x))


def test_zeros_around_the_map_count_as_sites_in_average_pooling(assert_close):
    layer, x = sparse.AvgPool2d(3, 2), dense_input(torch.float64, 2, 4)
    layer.around = (0, 0), (1, 1)
    reduce = divided(layer.around, x, include=True)
    compare_pooling(layer, "native", assert_close, 4, reduce, size=(3, 3), stride=2)


def test_max_pool_of_negative_features_never_takes_an_empty_site(backend):
    dense = -1 - dense_input(torch.float64).abs()
    pooled = sparse.MaxPool2d(3, 2, 1)(sparse.to_sparse(dense, pyramid(backend)))
    assert pooled.F.max() <= -1
    # the dense simulation fills empty sites with zero, which wins over every negative feature beside it
    simulated = functional.max_pool2d(dense * mask_at(contract_masks(), dense.shape[2]), 3, 2, padding=1)
    assert (simulated * mask_at(contract_masks(), simulated.shape[2])).max() == 0 > pooled.F.max()


@pytest.mark.parametrize(
    "make",
    [
        lambda: sparse.MaxPool2d(3, 2),
        lambda: sparse.MaxPool2d(3, 2, 1, ceil_mode=True),
        lambda: sparse.AvgPool2d(3, 1),
        lambda: sparse.AvgPool2d((2, 1)),
    ],
)
def test_what_shifts_sites_is_refused(make):
    with pytest.raises(ValueError, match="shifts sites: the output needs 1/stride of the input's sides$"):
        make().check()


def test_pooling_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="returns indices"):
        sparse.MaxPool2d(2, return_indices=True).check()
    for layer in (sparse.MaxPool2d(3, 2, 1), sparse.AvgPool2d(3, 2, 1)):
        layer.around = (0, 0), (1, 1)
        with pytest.raises(ValueError, match="pads what is padded with zeros"):
            layer.check()
