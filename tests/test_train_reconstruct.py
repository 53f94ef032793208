"""`spark-me reconstruct`, and what the pictures show."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image

from spark_me import build_model, cli
from spark_me.config import Config
from spark_me.config_schema import DataConfig, ModelConfig
from spark_me.data.datasets import Batch
from spark_me.train.checkpoint import TrainState, checkpoint_of, write_checkpoint
from spark_me.train.optim import build_optimizer
from spark_me.train.plots import plot_loss, plot_reconstruction

CONFIG = Config(
    model=ModelConfig(encoder="resnet18", backend="fused", image_size=[64, 96], decoder_width=32),
    data=DataConfig(root="images"),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = build_model("resnet18", image_size=(64, 96), decoder_width=32)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, build_optimizer(model, CONFIG.optim), scaler)
    content = checkpoint_of(state, CONFIG, task="pretrain", steps_per_epoch=1, data_fingerprint="")
    return write_checkpoint(tmp_path, content, keep_last=1)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.effect_noise((120, 90), 50).save(path)
    return path


def test_command_writes_a_picture_that_the_seed_decides(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    pictures = []
    for name, seed in (("a.png", "0"), ("b.png", "0"), ("c.png", "1")):
        out = tmp_path / name
        arguments = ["reconstruct", str(checkpoint), str(photo), str(photo), "--out", str(out), "--seed", seed]
        assert cli.main(arguments) == 0
        pictures.append(np.asarray(Image.open(out)))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("bad", ["checkpoint", "photo", "out"])
def test_bad_input_is_one_line(
    checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    out = tmp_path / "none" / "out.png" if bad == "out" else tmp_path / "out.png"
    damaged = {"checkpoint": checkpoint, "photo": photo}.get(bad)
    if damaged is not None:
        damaged.write_bytes(damaged.read_bytes()[:200])
    assert cli.main(["reconstruct", str(checkpoint), str(photo), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(damaged or out) in line
    assert not out.exists()


def test_picture_pastes_the_visible_pixels(tmp_path: Path) -> None:
    red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
    originals = red.view(1, 3, 1, 1).expand(1, 3, 64, 64)
    predictions = blue.view(1, 3, 1, 1).expand(1, 3, 64, 64)
    shown = torch.zeros(1, 64, 64, dtype=torch.bool)
    shown[:, :, :32] = True
    plot_reconstruction(originals, predictions, shown, tmp_path / "a.png")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    row = pixels[pixels.shape[0] // 2]
    inside = row[~(row == 1).all(axis=1)]  # without the white page
    colours, counts = np.unique(inside.round(1), axis=0, return_counts=True)
    share = {tuple(colour.tolist()): count / len(inside) for colour, count in zip(colours, counts)}
    # Left to right: red, red | grey, red | blue.
    assert share[(1.0, 0.0, 0.0)] == pytest.approx(4 / 6, abs=0.02)
    assert share[(0.5, 0.5, 0.5)] == pytest.approx(1 / 6, abs=0.02)
    assert share[(0.0, 0.0, 1.0)] == pytest.approx(1 / 6, abs=0.02)


def test_grey_images_are_drawn(tmp_path: Path) -> None:
    grey = torch.rand(2, 1, 32, 64)
    plot_reconstruction(grey, grey, torch.ones(2, 32, 64, dtype=torch.bool), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 100


def test_loss_plot_draws_what_is_there(tmp_path: Path) -> None:
    train = [{"step": step, "loss": 1 / step} for step in range(1, 50)]
    pictures = []
    for number, metrics in enumerate(([], train, [*train, {"step": 49, "held_out_loss": 0.5}])):
        plot_loss(metrics, tmp_path / f"{number}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png")))
    assert pictures[0].shape == pictures[1].shape == pictures[2].shape
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])


def test_model_keeps_its_mode(checkpoint: Path, tmp_path: Path) -> None:
    from spark_me.train.reconstruct import draw_reconstruction

    model = build_model("resnet18", image_size=(64, 96), decoder_width=32)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    for training in (True, False):
        model.train(training)
        draw_reconstruction(model, Batch(torch.rand(1, 3, 64, 96), [0], []), CONFIG, tmp_path / "a.png", seed=0)
        assert model.training is training
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
