"""Faults of MinkowskiEngine 0.5.4 that we mended: what it computes now, against plain loops and dense torch."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from spark_me.sparse.minkowski import ME


def scattered(sites, extent=(12, 15), images=2, seed=0):
    """int32 [images · sites, 3]: (image, y, x) of `sites` places in each image."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randperm(extent[0] * extent[1], generator=generator)[:sites] for _ in range(images)]
    rows = [torch.stack([torch.full_like(p, i), p // extent[1], p % extent[1]], 1) for i, p in enumerate(places)]
    return torch.cat(rows).int()


def features(rows, channels, seed=1):
    return torch.randn(rows, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensor(coordinates, values, manager=None):
    return ME.SparseTensor(values, coordinates, coordinate_manager=manager)


def in_a_child(text, *arguments):
    """Run what used to kill the process in one of its own."""
    command = [sys.executable, "-c", text, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent)
    assert result.returncode == 0, f"ended by {result.returncode}: {result.stderr[-1000:]}"
    return result.stdout


EMPTY = """
import torch
from test_engine_faults import ME, features, scattered, tensor

nothing = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
some = features(20, 4).requires_grad_()
pruned = ME.MinkowskiPruning()(tensor(scattered(10), some), torch.zeros(20, dtype=torch.bool))
made = tensor(torch.zeros(0, 3, dtype=torch.int32), nothing)
for x in (made, pruned):
    for layer, channels in (
        (ME.MinkowskiConvolution(4, 6, kernel_size=3, dimension=2), 6),
        (ME.MinkowskiConvolution(4, 6, kernel_size=3, stride=2, dimension=2), 6),
        (ME.MinkowskiConvolution(4, 6, kernel_size=3, expand_coordinates=True, dimension=2), 6),
        (ME.MinkowskiConvolutionTranspose(4, 6, kernel_size=3, dimension=2), 6),
        (ME.MinkowskiChannelwiseConvolution(4, kernel_size=3, dimension=2), 4),
        (ME.MinkowskiMaxPooling(kernel_size=3, stride=2, dimension=2), 4),
        (ME.MinkowskiMaxPooling(kernel_size=2, stride=2, dimension=2), 4),
        (ME.MinkowskiAvgPooling(kernel_size=3, stride=2, dimension=2), 4),
        (ME.MinkowskiSumPooling(kernel_size=2, stride=2, dimension=2), 4),
    ):
        # A transposed convolution goes back to the sites of the smaller stride, which here are those before pruning.
        sites = 20 if x is pruned and isinstance(layer, ME.MinkowskiConvolutionTranspose) else 0
        for _ in range(2):  # the second time, with the kernel map of the first
            y = layer.double()(x)
            assert y.F.shape == (sites, channels) and y.C.shape == (sites, 3) and (y.F == 0).all(), (layer, y)
            if not isinstance(layer, ME.MinkowskiChannelwiseConvolution):  # which added up no tensor at all
                y.F.sum().backward(retain_graph=True)
        assert all((p.grad == 0).all() for p in layer.parameters() if p.grad is not None), layer
assert nothing.grad.shape == (0, 4) and (some.grad == 0).all()

manager = ME.CoordinateManager(D=2)
empty, other, full = (tensor(scattered(n, seed=n), features(2 * n, 4), manager) for n in (0, 0, 10))
for one, two, sites in ((empty, full, 20), (full, empty, 20), (empty, other, 0)):
    united = ME.MinkowskiUnion()(one, two)
    assert united.F.shape == (sites, 4) and torch.allclose(united.F.sum(0), one.F.sum(0) + two.F.sum(0))
strided = manager.stride(empty.coordinate_map_key, 2)
assert [rows.tolist() for rows in manager.stride_map(empty.coordinate_map_key, strided)] == [[], []]
print("alive")
"""


def test_a_tensor_without_sites_kills_no_layer():
    assert in_a_child(EMPTY).split() == ["alive"]


def dense_of(coordinates, values, extent=(12, 15), images=2, empty=0.0):
    dense = values.new_full((images, *extent, values.shape[1]), empty)
    return dense.index_put(tuple(coordinates.long().unbind(1)), values).permute(0, 3, 1, 2)


def rows_at(dense, coordinates, stride=1):
    image, y, x = coordinates.long().unbind(1)
    return dense[image, :, y // stride, x // stride]


@pytest.mark.parametrize("other", ["union", "sum"])
def test_every_union_has_the_coordinates_of_its_own_inputs(other):
    manager = ME.CoordinateManager(D=2)
    coordinates = [scattered(sites, seed=sites) for sites in (20, 30, 25)]
    values = [features(len(rows), 3, seed).requires_grad_() for seed, rows in enumerate(coordinates)]
    tensors = [tensor(rows, leaf, manager) for rows, leaf in zip(coordinates, values)]
    unite = ME.MinkowskiUnion() if other == "union" else lambda one, other: one + other
    for one, two in ((0, 1), (1, 2), (2, 0), (0, 1)):
        united = unite(tensors[one], tensors[two])
        expected = dense_of(coordinates[one], values[one]) + dense_of(coordinates[two], values[two])
        sites = {tuple(site) for rows in (coordinates[one], coordinates[two]) for site in rows.tolist()}
        assert {tuple(site) for site in united.C.tolist()} == sites and len(united.C) == len(sites)
        assert torch.equal(united.F, rows_at(expected, united.C))
        weights = features(len(united.C), 3, seed=9)
        found = torch.autograd.grad((united.F * weights).sum(), [values[one], values[two]], retain_graph=True)
        dense_weights = dense_of(united.C, weights)
        for gradient, index in zip(found, (one, two)):
            assert torch.equal(gradient, rows_at(dense_weights, coordinates[index]))


POOL = """
import sys, torch
from test_engine_faults import GEOMETRIES, ME, features, pool_inputs, tensor

results = []
for kernel, stride in GEOMETRIES:
    coordinates, values = pool_inputs()
    y = ME.MinkowskiMaxPooling(kernel_size=kernel, stride=stride, dimension=2)(tensor(coordinates, values))
    (y.F * features(*y.F.shape, seed=5)).sum().backward()
    results.append((y.C, y.F.detach(), values.grad))
torch.save(results, sys.argv[1])
"""
GEOMETRIES = [(1, 3), (2, 3), (2, 4), (3, 5)]


def pool_inputs():
    coordinates = scattered(40)
    values = features(len(coordinates), 3) - 2  # most are negative: a zero is none of them
    values[::7] = -torch.inf
    return coordinates, values.requires_grad_()


def test_max_pooling_with_a_kernel_smaller_than_its_stride(tmp_path):
    in_a_child(POOL, tmp_path / "results")
    coordinates, values = pool_inputs()
    row_of = {tuple(site): row for row, site in enumerate(coordinates.tolist())}
    for (kernel, stride), (sites, pooled, gradient) in zip(
        GEOMETRIES, torch.load(tmp_path / "results", weights_only=True), strict=True
    ):
        expected, expected_gradient = torch.zeros_like(pooled), torch.zeros_like(gradient)
        weights = features(*pooled.shape, seed=5)
        reach = [step - kernel // 2 if kernel % 2 else step for step in range(kernel)]
        alone = 0
        for out, (image, y, x) in enumerate(sites.tolist()):
            seen = [row_of.get((image, y + down, x + across)) for down, across in itertools.product(reach, reach)]
            seen = [row for row in seen if row is not None]
            alone += not seen
            for channel in range(3 if seen else 0):
                best = max(seen, key=lambda row: values[row, channel].item())
                expected[out, channel] = values[best, channel].item()
                expected_gradient[best, channel] += weights[out, channel]
        assert alone, "every output has an input: nothing is tested"
        assert {tuple(site) for site in sites.tolist()} == {
            (image, y // stride * stride, x // stride * stride) for image, y, x in row_of
        }
        assert torch.equal(pooled, expected)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def cross(kernel_size):
    """(y, x) of a cross's offsets, as the engine's later versions number them."""
    offsets = [(0, 0)]
    for axis, size in enumerate(kernel_size):
        for step in [*range(1, size // 2 + 1), *range(-(size // 2), 0)]:
            offsets.append((step, 0) if axis == 0 else (0, step))
    return offsets


@pytest.mark.parametrize("kernel_size, stride, dilation", [((3, 3), 1, 1), ((5, 3), 1, 2), ((1, 5), 2, 1)])
def test_a_cross_has_the_offsets_of_a_cross(kernel_size, stride, dilation):
    coordinates = scattered(90)
    values = features(len(coordinates), 4).requires_grad_()
    x = tensor(coordinates, values)
    generator = ME.KernelGenerator(
        list(kernel_size), stride, dilation, region_type=ME.RegionType.HYPER_CROSS, dimension=2
    )
    layer = ME.MinkowskiConvolution(4, 6, stride=stride, kernel_generator=generator, dimension=2).double()
    offsets = cross(kernel_size)
    assert layer.kernel.shape == (len(offsets), 4, 6)
    y = layer(x)

    in_key, out_key = x.coordinate_map_key, y.coordinate_map_key
    settings = {"stride": stride, "dilation": dilation, "region_type": ME.RegionType.HYPER_CROSS}
    maps = x.coordinate_manager.kernel_map(in_key, out_key, kernel_size=list(kernel_size), **settings)
    row_of = {tuple(site): row for row, site in enumerate(coordinates.tolist())}
    for number, (down, across) in enumerate(offsets):
        pairs = {
            (row_of[(image, y + down * dilation, x + across * dilation)], out)
            for out, (image, y, x) in enumerate(y.C.tolist())
            if (image, y + down * dilation, x + across * dilation) in row_of
        }
        assert {tuple(pair) for pair in maps[number].T.tolist()} == pairs

    weight = torch.zeros(6, 4, *kernel_size, dtype=torch.float64)
    for matrix, (down, across) in zip(layer.kernel, offsets):
        weight[:, :, kernel_size[0] // 2 + down, kernel_size[1] // 2 + across] = matrix.T
    padding = [dilation * (size // 2) for size in kernel_size]
    dense = functional.conv2d(dense_of(coordinates, values), weight, None, stride, padding, dilation)
    expected = rows_at(dense, y.C, stride)
    torch.testing.assert_close(y.F, expected, rtol=1e-12, atol=1e-12)
    weights = features(*y.F.shape, seed=3)
    for ours, theirs in zip(
        torch.autograd.grad((y.F * weights).sum(), [values, layer.kernel]),
        torch.autograd.grad((expected * weights).sum(), [values, layer.kernel]),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cached", [False, True])
def test_zeros_may_be_kept_as_sites(cached):
    dense = features(2, 3 * 4 * 5).view(2, 3, 4, 5)
    dense[:, :, 1:3, 2:] = 0
    dense.requires_grad_()
    coordinates = ME.dense_coordinates(dense.shape) if cached else None
    x = ME.MinkowskiToSparseTensor(remove_zeros=False, coordinates=coordinates)(dense)
    assert {tuple(site) for site in x.C.tolist()} == set(itertools.product(range(2), range(4), range(5)))
    assert torch.equal(x.F, rows_at(dense, x.C))
    weights = features(*x.F.shape)
    (gradient,) = torch.autograd.grad((x.F * weights).sum(), dense)
    assert torch.equal(rows_at(gradient, x.C), weights)
    assert len(ME.MinkowskiToSparseTensor()(dense.detach()).C) == 2 * (20 - 6)
    with pytest.raises(AssertionError, match="cannot be used with remove_zeros=True"):
        ME.MinkowskiToSparseTensor(coordinates=ME.dense_coordinates(dense.shape))


@pytest.mark.parametrize(
    "name", ["MinkowskiOps", "MinkowskiFunctional", "MinkowskiNonlinearity", "MinkowskiSparseTensor"]
)
def test_published_code_finds_modules_by_their_bare_names(name):
    bare, ours = importlib.import_module(name), importlib.import_module(f"MinkowskiEngine.{name}")
    public = {key for key in vars(ours) if not key.startswith("_")}
    assert public and all(getattr(bare, key) is getattr(ours, key) for key in public)
    assert str(Path(ME.__file__).parent) not in sys.path


def test_the_import_that_convnext_v2_does():
    scope: dict[str, object] = {}
    exec("from MinkowskiOps import SparseTensor, to_sparse", scope)
    assert scope["SparseTensor"] is ME.SparseTensor and scope["to_sparse"] is ME.to_sparse
