"""What the pictures of a run show."""

from itertools import combinations
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor

from spark_me.errors import printable
from spark_me.train.plots import (
    HIDDEN_COLOUR,
    NODATA_COLOUR,
    UNPREDICTED_COLOUR,
    Row,
    plot_loss,
    plot_reconstruction,
    reconstruction_figure,
)

KEYS = {
    HIDDEN_COLOUR: "hidden",
    NODATA_COLOUR: "no data",
    UNPREDICTED_COLOUR: "not predicted: its patch has pixels without data",
}


def row_of(kinds: Tensor, *, name: str = "a.png", channels: int = 3, loss: float = 0.5) -> Row:
    """A row whose pixels are visible (0), predicted (1), without data (2) or else neither; original 1, prediction 0."""
    original = torch.ones(channels, *kinds.shape)
    return Row(name, loss, original, torch.zeros_like(original), kinds == 0, kinds == 1, kinds == 2)


def test_loss_plot_draws_what_is_there(tmp_path: Path) -> None:
    train = [{"step": step, "loss": 1 / step} for step in range(1, 50)]
    pictures = []
    for number, metrics in enumerate(([], train, [*train, {"step": 49, "held_out_loss": 0.5}])):
        plot_loss(metrics, tmp_path / f"{number}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png")))
    assert pictures[0].shape == pictures[1].shape == pictures[2].shape
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])


def test_picture_pastes_the_visible_pixels(tmp_path: Path) -> None:
    red, blue = (torch.tensor(colour).view(3, 1, 1).expand(3, 64, 64) for colour in ([1.0, 0, 0], [0, 0, 1.0]))
    shown = torch.zeros(64, 64, dtype=torch.bool)
    shown[:, :32] = True
    row = Row("a.png", 0.5, red, blue, shown, ~shown, torch.zeros_like(shown))
    plot_reconstruction([row], "title", [], tmp_path / "a.png")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    line = pixels[pixels.shape[0] // 2]
    inside = line[~(line == 1).all(axis=1)]  # without the white page
    colours, counts = np.unique(inside.round(1), axis=0, return_counts=True)
    share = {tuple(colour.tolist()): count / len(inside) for colour, count in zip(colours, counts)}
    # Left to right: red, red | grey, red | blue.
    assert share[(1.0, 0.0, 0.0)] == pytest.approx(4 / 6, abs=0.02)
    assert share[(0.5, 0.5, 0.5)] == pytest.approx(1 / 6, abs=0.02)
    assert share[(0.0, 0.0, 1.0)] == pytest.approx(1 / 6, abs=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_kind_of_pixel_has_its_colour(channels: int) -> None:
    kinds = torch.tensor([[0, 1, 2, 3]]).repeat_interleave(32, 1).repeat(64, 1)
    figure = reconstruction_figure([row_of(kinds, channels=channels)], "title", [])
    white, black = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    expected = (
        (white, white, NODATA_COLOUR, white),
        (white, HIDDEN_COLOUR, NODATA_COLOUR, UNPREDICTED_COLOUR),
        (white, black, NODATA_COLOUR, UNPREDICTED_COLOUR),
    )
    for axes, colours in zip(figure.axes, expected, strict=True):
        image = axes.get_images()[0].get_array()
        for kind, colour in enumerate(colours):
            np.testing.assert_allclose(image[:, 32 * kind : 32 * kind + 32] - np.array(colour), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([0, 1], [HIDDEN_COLOUR]),
        ([1, 0, 3], [HIDDEN_COLOUR, UNPREDICTED_COLOUR]),
        ([1, 2], [HIDDEN_COLOUR, NODATA_COLOUR]),
        ([3, 2, 1], [HIDDEN_COLOUR, NODATA_COLOUR, UNPREDICTED_COLOUR]),
    ],
)
def test_legend_lists_what_occurs(kinds: list[int], expected: list[tuple[float, float, float]]) -> None:
    """In any of the rows."""
    rows = [row_of(torch.tensor([[0, 1, 0]])), row_of(torch.tensor([[*kinds, 0, 0][:3]]))]
    (legend,) = reconstruction_figure(rows, "title", []).legends
    found = [key.get_facecolor()[:3] for key in legend.get_patches()]
    assert found == expected
    assert [text.get_text() for text in legend.get_texts()] == [KEYS[colour] for colour in expected]


def test_colours_differ_in_lightness() -> None:
    """So that they differ for every eye: CIE L* of sRGB, by its definition."""

    def lightness(colour: tuple[float, float, float]) -> float:
        linear = [((value + 0.055) / 1.055) ** 2.4 for value in colour]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        return 116 * luminance ** (1 / 3) - 16

    values = [lightness(colour) for colour in KEYS]
    assert all(abs(one - other) > 20 for one, other in combinations(values, 2))
    # Nor are they shades of grey, but for hidden patches.
    assert all(max(colour) - min(colour) > 0.5 for colour in (NODATA_COLOUR, UNPREDICTED_COLOUR))


@pytest.mark.parametrize("shape", [(32, 320), (96, 64), (224, 32)])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("name", ["W" * 200, "a.png", "$x^2$ and $\\frac$.png"])
def test_nothing_overlaps(shape: tuple[int, int], rows: int, name: str) -> None:
    kinds = torch.arange(4).repeat(shape[0], shape[1] // 4)
    title = f"{'W' * 20}, step 1000000, mask ratio 0.612345: mean loss 1234.5678"
    drawn = [row_of(kinds, name=name, loss=1234.5678) for _ in range(rows)]
    figure = reconstruction_figure(drawn, title, ["n" * 100, "n" * 100, "n" * 100])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    boxes += [axes.get_window_extent() for axes in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    assert len(boxes) == (1 + 3 + 2 * rows + 3) + 3 * rows + 1
    for one, other in combinations(boxes, 2):
        assert min(one.x1, other.x1) <= max(one.x0, other.x0) or min(one.y1, other.y1) <= max(one.y0, other.y0)
    width, height = canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    for axes in figure.axes:  # pixels are squares
        box = axes.get_window_extent()
        assert box.height / box.width == pytest.approx(shape[0] / shape[1])


@pytest.mark.filterwarnings("error::UserWarning")
def test_any_file_name_can_be_drawn(tmp_path: Path) -> None:
    name = b"line\nbreak \xff $x^$ \xe7\x8c\xab.png".decode(errors="surrogateescape")
    assert printable(name) == "line\ufffdbreak \ufffd $x^$ 猫.png"
    plot_reconstruction([row_of(torch.tensor([[0, 1]]), name=name)], "title", [], tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()
