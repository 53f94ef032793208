"""Tables for GPU kernels: against the tables of the other algorithms, a loop over places, and without real data."""

import pytest
import torch
from conftest import contract_masks
from masked_convolutions import square_window
from torch._subclasses.fake_tensor import FakeTensorMode

from spark_me.sparse.neighbours import Neighbours, Window
from spark_me.sparse.pyramid import Pyramid

WINDOWS = [
    square_window(*settings)
    for settings in [
        (1, 3, 1), (1, 7, 2), (2, 3, 2), (4, 3, 2), (2, 2, 2), (2, 4, 4), (8, 3, 1), (8, 5, 1), (1, 7, 1), (1, 1, 2),
        (1, 3, 1, 2), (2, 5, 2, 3), (4, 2, 2, 2), (8, 7, 1, 2), (1, 3, 4), (1, 4, 2), (4, 7, 2, 3),
    ]
] + [
    Window(2, (1, 7), 1, (1, 1), (0, 3)), Window(8, (11, 1), 1, (1, 1), (5, 0)), Window(2, (3, 5), 2, (2, 1), (2, 2)),
    Window(2, (3, 3), 2, (1, 1), (0, 0)), Window(4, (4, 4), 2, (1, 1), (1, 1)), Window(8, (2, 2), 1, (1, 1), (1, 0)),
    Window(2, (2, 3), 2, (1, 3), (-1, 6)),
]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS)
def test_a_table_is_that_of_the_other_algorithms(window, visible):
    neighbours = Neighbours(visible, 8)
    table = neighbours.inputs_of_outputs(window)
    assert table.dtype == torch.int32 and table.is_contiguous()
    assert torch.equal(table.t(), neighbours.of_sites(window))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_transposed_table_leads_back(window, visible):
    neighbours = Neighbours(visible, 8)
    inputs, outputs = neighbours.sites(window.in_stride), neighbours.sites(window.out_stride)
    expected = torch.full((window.volume, inputs), outputs, dtype=torch.int32)
    for output, rows in enumerate(neighbours.of_sites(window).tolist()):
        for offset, row in enumerate(rows):
            if row < inputs:
                assert expected[offset, row] == outputs  # else an input would have two outputs
                expected[offset, row] = output
    table = neighbours.outputs_of_inputs(window)
    assert table.dtype == torch.int32 and table.is_contiguous()
    assert torch.equal(table, expected)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("stride", [2, 8])
def test_tables_of_the_dense_map_and_back(stride, kernel_size, visible):
    pyramid = Pyramid(visible, 8)
    images, height, width = pyramid.extent(stride)
    row_of = {(b, y // stride, x // stride): row for row, (b, y, x) in enumerate(pyramid.coordinates(stride).tolist())}
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
    neighbours = Neighbours(visible, 8)
    window = square_window(2, 3, 2)
    assert neighbours.inputs_of_outputs(window) is neighbours.inputs_of_outputs(window)
    assert neighbours.outputs_of_inputs(window) is neighbours.outputs_of_inputs(window)
    assert neighbours.inputs_of_places(4, 3) is neighbours.inputs_of_places(4, 3)
    assert neighbours.places_of_inputs(4, 3) is neighbours.places_of_inputs(4, 3)


def test_no_shape_depends_on_the_masks_values():
    """What follows the constructor runs without data: on a GPU it never waits for the device."""
    neighbours = Neighbours(contract_masks(), 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for window in WINDOWS[:4] + WINDOWS[-7:]:
            assert neighbours.inputs_of_outputs(window).shape == (window.volume, neighbours.sites(window.out_stride))
            assert neighbours.outputs_of_inputs(window).shape == (window.volume, neighbours.sites(window.in_stride))
        assert neighbours.inputs_of_places(4, 3).shape == (9, 6 * 6 * 8)
        assert neighbours.places_of_inputs(4, 3).shape == (9, neighbours.sites(4))
