"""`spark-me schedule`: the table says what the trainer will do, and the plot shows the published recipes' curves."""

from pathlib import Path

import matplotlib.image
import pytest
from tiny_runs import write_config, write_images

from spark_me import cli

PRETRAIN = Path(__file__).parents[1] / "configs" / "pretrain"
RECIPE = PRETRAIN / "spark_resnet50_1600e_in1k.yaml"


def rows_of(out: str) -> dict[str, list[float]]:
    """The numbers of a printed table by the name of their row: step, epoch, learning rate, weight decay."""
    names = ("first", "warmed up", "half-way", "last")
    lines = {name: line.split(name)[1] for name in names for line in out.splitlines() if line.startswith(f"  {name} ")}
    return {name: [float(word) for word in line.split()] for name, line in lines.items()}


def test_a_recipe_without_its_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schedule", str(RECIPE), "--images", "1281167"]) == 0
    out = capsys.readouterr().out
    assert "1281167 images, 313 steps an epoch, 500800 steps" in out
    assert "lamb with peak lr 0.0032 (base_lr 0.0002 · 4096 / 256)" in out
    rows = rows_of(out)
    assert rows["first"] == [0, 0.0, 1.6e-5, 0.04]
    assert rows["warmed up"] == [12520, 40.0, 3.2e-3, 0.0402]
    assert rows["half-way"][2:] == [1.67e-3, 0.12]
    assert rows["last"] == [500799, 1600.0, 3.2e-6, 0.2]


def test_overrides_hold_and_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"))  # 10, of which 2 are held out
    assert cli.main(["schedule", str(path), "train.epochs=3", "optim.warmup_epochs=1"]) == 0
    out = capsys.readouterr().out
    assert "8 images, 4 steps an epoch, 12 steps" in out
    assert rows_of(out)["warmed up"][:2] == [4, 1.0]


def test_the_plot_has_a_panel_for_each(tmp_path: Path) -> None:
    recipes = [str(path) for path in sorted(PRETRAIN.glob("spark_resnet*.yaml"))]
    plot = tmp_path / "plot.png"
    assert len(recipes) == 4
    assert cli.main(["schedule", *recipes, "--images", "1281167", "--plot", str(plot)]) == 0
    picture = matplotlib.image.imread(plot)[:, :, :3]
    blue = (abs(picture - (0.12, 0.47, 0.71)) < 0.02).all(axis=2)  # tab:blue
    height, width = blue.shape
    panels = [
        blue[row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3].any()
        for row in range(2)
        for column in range(3)
    ]
    assert panels == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.epochs=3"], "no configuration"),
        ([str(RECIPE)], "data.root=null"),
        ([str(RECIPE), "--images", "100"], "train.batch_size=4096 is more than the 100 images"),
        (
            [str(RECIPE), "--images", "5000", "--plot", "/nowhere/plot.png"],
            "/nowhere/plot.png: the folder /nowhere does not exist",
        ),
    ],
)
def test_what_stands_in_the_way(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schedule", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
