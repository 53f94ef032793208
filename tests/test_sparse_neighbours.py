"""Neighbour tables against MinkowskiEngine's own kernel maps and plain loops, and without real data."""

import pytest
import torch
from conftest import contract_masks
from masked_convolutions import square_window
from torch._subclasses.fake_tensor import FakeTensorMode

from spark_me import sparse
from spark_me.sparse.neighbours import Neighbours, VisiblePatches, Window

WINDOWS = [
    square_window(*settings)
    for settings in [
        (1, 3, 1), (1, 7, 2), (2, 3, 2), (4, 3, 2), (2, 2, 2), (2, 4, 4), (4, 3, 1), (8, 3, 1), (8, 5, 1), (1, 7, 1),
        (1, 1, 2), (1, 3, 1, 2), (2, 5, 2, 3), (4, 2, 2, 2), (8, 7, 1, 2), (1, 3, 4), (1, 4, 2), (4, 7, 2, 3),
    ]
] + [
    Window(in_stride, size, stride, dilation, (0, 0)).in_engine
    for in_stride, size, stride, dilation in [
        (2, (1, 7), 1, (1, 1)), (4, (7, 1), 1, (1, 1)), (2, (3, 5), 2, (1, 2)), (2, (3, 5), 2, (2, 1)),
        (8, (1, 11), 1, (1, 1)), (8, (11, 1), 1, (1, 1)),
    ]
]  # fmt: skip
ELSEWHERE = [
    square_window(2, 3, 2)._replace(before=(0, 0)),
    square_window(4, 3, 2, 2)._replace(before=(1, 2)),
    square_window(2, 4, 2)._replace(before=(1, 1)),
    square_window(4, 4, 2)._replace(before=(1, 1)),
    square_window(8, 2)._replace(before=(1, 0)),
    square_window(2, 2, 2)._replace(before=(-1, 1)),
    Window(2, (3, 5), 2, (1, 1), (0, 4)),
    Window(8, (1, 3), 1, (1, 4), (0, 8)),
    Window(2, (2, 3), 2, (1, 3), (-1, 6)),
]
"""Kernels that start elsewhere than the engine's."""


def entries(neighbours, window):
    """(offset, input row, output row) of the table of sites and of the pairs."""
    table, missing = neighbours.inputs_of_outputs(window), neighbours.sites(window.in_stride)
    assert table.dtype == torch.int32 and table.is_contiguous()
    from_table = {
        (offset, row_in, row_out)
        for offset, rows_in in enumerate(table.tolist())
        for row_out, row_in in enumerate(rows_in)
        if row_in != missing
    }
    from_pairs = {
        (across * window.size[0] + down, row_in, row_out)
        for (down, across), rows_in, rows_out in neighbours.pairs(window)
        for row_in, row_out in zip(rows_in.tolist(), rows_out.tolist())
    }
    return from_table, from_pairs


def numbered(pyramid, stride):
    """The row of every site (image, y, x) of a stride."""
    return {(b, y // stride, x // stride): row for row, (b, y, x) in enumerate(pyramid.coordinates(stride).tolist())}


@pytest.mark.parametrize("window", WINDOWS)
def test_tables_equal_the_engines_kernel_maps(window, visible):
    pyramid = sparse.Pyramid(visible, 8)
    kernel_map = pyramid.kernel_map(
        pyramid.key(window.in_stride),
        pyramid.key(window.out_stride),
        stride=window.stride,
        kernel_size=list(window.size),
        dilation=list(window.dilation),
    )
    expected = {
        (offset, row_in, row_out)
        for offset, (rows_in, rows_out) in kernel_map.items()
        for row_in, row_out in zip(rows_in.tolist(), rows_out.tolist())
    }
    assert entries(pyramid.neighbours, window) == (expected, expected)


@pytest.mark.parametrize("window", WINDOWS + ELSEWHERE)
def test_tables_equal_a_loop_over_sites(window, visible):
    pyramid = sparse.Pyramid(visible, 8)
    row_of, expected = numbered(pyramid, window.in_stride), set()
    for (image, y, x), row_out in numbered(pyramid, window.out_stride).items():
        for down in range(window.size[0]):
            for across in range(window.size[1]):
                place = (
                    y * window.stride - window.before[0] + down * window.dilation[0],
                    x * window.stride - window.before[1] + across * window.dilation[1],
                )
                if (image, *place) in row_of:
                    expected.add((across * window.size[0] + down, row_of[(image, *place)], row_out))
    assert expected and entries(pyramid.neighbours, window) == (expected, expected)


@pytest.mark.parametrize("window", [square_window(2, 3, 2), Window(4, (3, 5), 1, (1, 2), (0, 3)), ELSEWHERE[0]])
def test_mirrored_tables_have_the_maps_sites_in_the_place_of_those_outside(window, visible):
    pyramid = sparse.Pyramid(visible, 8)
    _, *lengths = pyramid.extent(window.in_stride)
    row_of = numbered(pyramid, window.in_stride)
    table = pyramid.neighbours.mirrored(window).t().tolist()
    for (image, *place), row_out in numbered(pyramid, window.out_stride).items():
        for offset, row_in in enumerate(table[row_out]):
            axes = []
            for position, k, length, near, step in zip(
                place, (offset % window.size[0], offset // window.size[0]), lengths, window.before, window.dilation
            ):
                there = position * window.stride - near + k * step
                axes.append(-there if there < 0 else 2 * length - 2 - there if there >= length else there)
            assert row_in == row_of.get((image, *axes), len(row_of))


def test_outside_of_map_is_beyond_the_border(visible):
    neighbours, first, length = Neighbours(VisiblePatches.of(visible), 8), (-2, -5), (7, 10)
    outside = neighbours.outside_of_tiles(2, first, length)
    for number, (_, row, column) in enumerate(visible.nonzero().tolist()):
        for down in range(length[0]):
            for across in range(length[1]):
                y, x = row * 4 + first[0] + down, column * 4 + first[1] + across
                assert outside[number, down, across] == (not (0 <= y < 12 and 0 <= x < 16))


@pytest.mark.parametrize("window", WINDOWS + ELSEWHERE)
def test_counts_are_the_neighbours_present(window, visible):
    neighbours = Neighbours(VisiblePatches.of(visible), 8)
    expected = [[0] for _ in range(neighbours.sites(window.out_stride))]
    for _, _, rows_out in neighbours.pairs(window):
        for row in rows_out.tolist():
            expected[row][0] += 1
    assert neighbours.counts(window).tolist() == expected


def test_tiles_hold_each_patch_and_its_halo(visible):
    neighbours = Neighbours(VisiblePatches.of(visible), 8)
    side, first, length = 4, (-1, -3), (6, 9)
    row_of = {}
    for image, y, x in [tuple(site) for site in sparse.Pyramid(visible, 8).coordinates(2).tolist()]:
        row_of[image, y // 2, x // 2] = len(row_of)
    tiles = neighbours.tiles(2, first, length)
    for number, (image, row, column) in enumerate(visible.nonzero().tolist()):
        for down in range(length[0]):
            for across in range(length[1]):
                site = (image, row * side + first[0] + down, column * side + first[1] + across)
                assert tiles[number, down, across] == row_of.get(site, len(row_of))


@pytest.mark.parametrize("stride", [2, 8])
def test_pairs_to_raster_reach_every_place_beside_a_site(stride, visible):
    pyramid = sparse.Pyramid(visible, 8)
    _, height, width = pyramid.extent(stride)
    sites = [(image, y // stride, x // stride) for image, y, x in pyramid.coordinates(stride).tolist()]
    expected = {
        ((down, across), row, (image * height + y - down + 1) * width + x - across + 1)
        for row, (image, y, x) in enumerate(sites)
        for down in range(3)
        for across in range(3)
        if 0 <= y - down + 1 < height and 0 <= x - across + 1 < width
    }
    pairs = {
        (offset, row, place)
        for offset, rows, places in pyramid.neighbours.pairs_to_raster(stride, 3)
        for row, place in zip(rows.tolist(), places.tolist())
    }
    assert pairs == expected


@pytest.mark.parametrize("window", WINDOWS + ELSEWHERE)
def test_the_transposed_table_leads_back(window, visible):
    neighbours = Neighbours(VisiblePatches.of(visible), 8)
    inputs, outputs = neighbours.sites(window.in_stride), neighbours.sites(window.out_stride)
    expected = torch.full((window.volume, inputs), outputs, dtype=torch.int32)
    for offset, rows in enumerate(neighbours.inputs_of_outputs(window).tolist()):
        for output, row in enumerate(rows):
            if row < inputs:
                assert expected[offset, row] == outputs  # else an input would have two outputs
                expected[offset, row] = output
    table = neighbours.outputs_of_inputs(window)
    assert table.dtype == torch.int32 and table.is_contiguous()
    assert torch.equal(table, expected)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("stride", [2, 8])
def test_tables_of_the_dense_map_and_back(stride, kernel_size, visible):
    pyramid = sparse.Pyramid(visible, 8)
    images, height, width = pyramid.extent(stride)
    row_of = numbered(pyramid, stride)
    table = pyramid.neighbours.inputs_of_places(stride, kernel_size)
    transposed = pyramid.neighbours.places_of_inputs(stride, kernel_size)
    places = images * height * width
    assert table.shape == (kernel_size**2, places) and transposed.shape == (kernel_size**2, len(row_of))
    assert table.dtype == transposed.dtype == torch.int32
    expected = torch.full_like(transposed, places)
    for place, rows in enumerate(table.t().tolist()):
        image, y, x = place // (height * width), place // width % height, place % width
        for offset, row in enumerate(rows):
            across, down = offset // kernel_size - kernel_size // 2, offset % kernel_size - kernel_size // 2
            assert row == row_of.get((image, y + down, x + across), len(row_of))
            if row < len(row_of):
                expected[offset, row] = place
    assert torch.equal(transposed, expected)


def test_tables_are_built_once(visible):
    neighbours, window = Neighbours(VisiblePatches.of(visible), 8), square_window(2, 3, 2)
    for build in (neighbours.inputs_of_outputs, neighbours.outputs_of_inputs, neighbours.pairs):
        assert build(window) is build(window)
    for build in (neighbours.inputs_of_places, neighbours.places_of_inputs, neighbours.pairs_to_raster):
        assert build(4, 3) is build(4, 3)


def test_no_shape_depends_on_the_masks_values():
    """What follows the constructor runs without data: on a GPU it never waits for the device."""
    neighbours = Neighbours(VisiblePatches.of(contract_masks()), 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for window in WINDOWS[:4] + ELSEWHERE:
            assert neighbours.inputs_of_outputs(window).shape == (window.volume, neighbours.sites(window.out_stride))
            assert neighbours.outputs_of_inputs(window).shape == (window.volume, neighbours.sites(window.in_stride))
        assert neighbours.inputs_of_places(4, 3).shape == (9, 6 * 6 * 8)
        assert neighbours.places_of_inputs(4, 3).shape == (9, neighbours.sites(4))
