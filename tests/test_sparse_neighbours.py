"""The fused backend's tables against MinkowskiEngine's own kernel maps and a plain loop."""

import pytest

from spark_me import sparse
from spark_me.sparse.neighbours import Neighbours, Window

WINDOWS = [
    Window(*settings)
    for settings in [
        (1, 3, 1), (1, 7, 2), (2, 3, 2), (4, 3, 2), (2, 2, 2), (2, 4, 4), (4, 3, 1), (8, 3, 1), (8, 5, 1), (1, 7, 1),
        (1, 3, 1, 2), (2, 5, 2, 3), (4, 2, 2, 2), (8, 7, 1, 2),
    ]
]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS)
def test_tables_equal_the_engines_kernel_maps(window, visible):
    pyramid = sparse.Pyramid(visible, 8)
    kernel_map = pyramid.kernel_map(
        pyramid.key(window.in_stride),
        pyramid.key(window.out_stride),
        stride=window.stride,
        kernel_size=window.kernel_size,
        dilation=window.dilation,
    )
    expected = {
        (offset, row_in, row_out)
        for offset, (rows_in, rows_out) in kernel_map.items()
        for row_in, row_out in zip(rows_in.tolist(), rows_out.tolist())
    }
    table = pyramid.neighbours.of_sites(window)
    missing = pyramid.neighbours.sites(window.in_stride)
    from_table = {
        (offset, row_in, row_out)
        for row_out, rows_in in enumerate(table.tolist())
        for offset, row_in in enumerate(rows_in)
        if row_in != missing
    }
    from_pairs = {
        (offset, row_in, row_out)
        for offset, rows_in, rows_out in pyramid.neighbours.pairs(window)
        for row_in, row_out in zip(rows_in.tolist(), rows_out.tolist())
    }
    assert from_table == expected
    assert from_pairs == expected


@pytest.mark.parametrize("window", WINDOWS)
def test_counts_are_the_neighbours_present(window, visible):
    neighbours = Neighbours(visible, 8)
    expected = [[0] for _ in range(neighbours.sites(window.out_stride))]
    for _, _, rows_out in neighbours.pairs(window):
        for row in rows_out.tolist():
            expected[row][0] += 1
    assert neighbours.counts(window).tolist() == expected


def test_tiles_hold_each_patch_and_its_halo(visible):
    neighbours = Neighbours(visible, 8)
    side, first, length = 4, -1, 6
    row_of = {}
    for image, y, x in [tuple(site) for site in sparse.Pyramid(visible, 8).coordinates(2).tolist()]:
        row_of[image, y // 2, x // 2] = len(row_of)
    tiles = neighbours.of_tiles(2, first, length)
    for number, (image, row, column) in enumerate(visible.nonzero().tolist()):
        for down in range(length):
            for across in range(length):
                site = (image, row * side + first + down, column * side + first + across)
                assert tiles[number, down, across] == row_of.get(site, len(row_of))


@pytest.mark.parametrize("stride", [2, 8])
def test_pairs_to_raster_reach_every_place_beside_a_site(stride, visible):
    pyramid = sparse.Pyramid(visible, 8)
    _, height, width = pyramid.extent(stride)
    sites = [(image, y // stride, x // stride) for image, y, x in pyramid.coordinates(stride).tolist()]
    expected = {
        (across * 3 + down, row, (image * height + y - down + 1) * width + x - across + 1)
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


def test_tables_are_built_once(visible):
    neighbours = Neighbours(visible, 8)
    window = Window(4, 3, 1)
    assert neighbours.of_sites(window) is neighbours.of_sites(window)
    assert neighbours.pairs(window) is neighbours.pairs(window)
