"""`spark-me reconstruct`, and what the pictures show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from matplotlib.figure import Figure
from PIL import Image
from tiny_runs import RESNET, write_config, write_images

from spark_me import build_model, cli
from spark_me.config.data import DataConfig
from spark_me.config.loading import load_config
from spark_me.config.tasks import ModelConfig, PretrainConfig
from spark_me.data.files import Files, find_files
from spark_me.data.loaders import held_out_dataset
from spark_me.data.reading import Encoded
from spark_me.masking import draw_visible_of_samples
from spark_me.train import plots
from spark_me.train.checkpoint import TrainState, checkpoint_of, list_checkpoints, write_checkpoint
from spark_me.train.plots import HIDDEN_COLOUR, NODATA_COLOUR, UNPREDICTED_COLOUR, reconstruction_figure
from spark_me.train.pretrain import pretrain
from spark_me.train.reconstruct import draw_reconstruction, load_images, model_of, read_subjects
from spark_me.train.schedules import build_optimizer

CONFIG = PretrainConfig(
    model=ModelConfig(encoder=RESNET, backend="native", image_size=[64, 96], decoder_width=32),
    data=DataConfig(root="images"),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = randomise(build_model(RESNET, image_size=(64, 96), decoder_width=32))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, build_optimizer(model, CONFIG.optim), scaler, step=1234)
    content = checkpoint_of(state, CONFIG, task="pretrain", steps_per_epoch=1, data_fingerprint="")
    return write_checkpoint(tmp_path, content, keep_last=1)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of reconstructions as they are drawn."""
    drawn = []

    def draw(*args) -> Figure:
        drawn.append(reconstruction_figure(*args))
        return drawn[-1]

    monkeypatch.setattr(plots, "reconstruction_figure", draw)
    return drawn


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


def test_picture_names_images_losses_and_step(
    checkpoint: Path, photo: Path, tmp_path: Path, figures: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    long = photo.rename(tmp_path / f"{'first' * 30}last.jpg")
    grey = tmp_path / "grey.png"
    Image.effect_noise((200, 90), 20).save(grey)
    out = tmp_path / "out.png"
    assert cli.main(["reconstruct", str(checkpoint), str(long), str(grey), "--out", str(out)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"wrote {out}"
    (figure,) = figures
    texts = [text.get_text() for text in figure.texts]
    losses = [text.removeprefix("loss ") for text in texts if text.startswith("loss ")]
    assert lines == [f"{path}  loss {loss}" for path, loss in zip((long, grey), losses, strict=True)]
    assert losses[0] != losses[1]
    mean = np.mean([float(loss) for loss in losses])
    head, _, shown_mean = texts[0].rpartition(" ")
    assert head == f"{RESNET}, step 1234, mask ratio 0.6: mean loss"
    assert float(shown_mean) == pytest.approx(mean, abs=1e-4)
    (name,) = [text for text in texts if text.startswith("first")]
    assert name.endswith("last.jpg") and len(name) < 60 and "grey.png" in texts
    assert any("predicting nothing scores 1.0" in text for text in texts)
    assert not any("Shown: " in text for text in texts)  # plain photos


NODATA_CASES = [(channels, nodata) for channels in (1, 2, 3, 13) for nodata in (None, 0.0, float("nan"))]


@pytest.mark.parametrize(("channels", "nodata"), NODATA_CASES)
def test_picture_against_the_files_themselves(
    tmp_path: Path, figures: list[Figure], channels: int, nodata: float | None
) -> None:
    """Every pixel of every column, and every loss, by loops over the patches of the stored arrays in float64."""
    height, width = 64, 96
    mean, std = [0.4 + 0.01 * band for band in range(channels)], [0.25] * channels
    generator = np.random.default_rng(channels)
    arrays, holes = [], []
    for number in range(2):
        array = generator.uniform(0.1, 0.9, (height, width, channels)).astype(np.float32)
        hole = np.zeros((height, width), dtype=bool)
        if nodata is not None:
            hole[5 + number :: 64, 10:40] = True  # in the upper left patches
            array[hole] = nodata
        np.save(tmp_path / f"{number}.npy", array)
        arrays.append((array.astype(np.float64) - mean) / std)
        holes.append(hole)
    model_config = ModelConfig(
        encoder=RESNET, backend="native", image_size=[height, width], decoder_width=32, in_channels=channels
    )
    config = PretrainConfig(model=model_config, data=DataConfig(root="images", mean=mean, std=std, nodata=nodata))
    model = randomise(model_of(config))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()

    subjects = load_images(sorted(tmp_path.glob("*.npy")), config)
    losses = draw_reconstruction(model, subjects, config, tmp_path / "a.png", step=7, seed=3)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (figure,) = figures
    texts = [text.get_text() for text in figure.texts]
    caption = {
        2: "Shown: band 1 of 2 as grey, within 2.5 deviations of its mean.",
        13: "Shown: bands 1, 2, 3 of 13 as red, green, blue, within 2.5 deviations of their mean.",
    }.get(channels)
    assert [text for text in texts if text.startswith("Shown")] == ([caption] if caption else [])
    valid = np.array(
        [[[not hole[r : r + 32, c : c + 32].any() for c in (0, 32, 64)] for r in (0, 32)] for hole in holes]
    )
    visible = draw_visible_of_samples(3, 0, [0, 1], (2, 3), 0.6, None if nodata is None else torch.from_numpy(valid))
    model = model.double().eval()
    images = np.stack([np.where(hole[..., None], 0, array) for array, hole in zip(arrays, holes)]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        normalised = model.predict(torch.from_numpy(images), visible).numpy()
    for number, (array, hole) in enumerate(zip(arrays, holes)):

        def display(image: np.ndarray) -> np.ndarray:
            image = image * 0.2 + 0.5 if caption else image * std + mean
            image = image[..., :3] if channels >= 3 else image[..., [0, 0, 0]]
            return image.clip(0, 1)

        original = display(array)
        original[hole] = NODATA_COLOUR
        partial, reconstruction = original.copy(), original.copy()
        errors = []
        for r in range(2):
            for c in range(3):
                place = (slice(32 * r, 32 * r + 32), slice(32 * c, 32 * c + 32))
                if visible[number, r, c]:
                    continue
                if not valid[number, r, c]:
                    for picture in (partial, reconstruction):
                        picture[place] = np.where(hole[place][..., None], NODATA_COLOUR, UNPREDICTED_COLOUR)
                    continue
                patch, predicted = array[place], normalised[number].transpose(1, 2, 0)[place]
                deviation = np.sqrt(patch.var(ddof=1) + 1e-6)
                errors.append(np.square(predicted - (patch - patch.mean()) / deviation).mean())
                partial[place] = HIDDEN_COLOUR
                reconstruction[place] = display(predicted * deviation + patch.mean())
        assert losses[number] == pytest.approx(np.mean(errors), rel=1e-4)
        for axes, expected in zip(figure.axes[3 * number :], (original, partial, reconstruction)):
            np.testing.assert_allclose(axes.get_images()[0].get_array(), expected, atol=2e-3)
        start = texts.index(f"{number}.npy")
        assert texts[start + 1] == f"loss {losses[number]:.4f}"
    keys = [text.get_text() for text in figure.legends[0].get_texts()]
    assert (
        keys[:2] == (["hidden"] if nodata is None else ["hidden", "no data"])
        and len(keys) == (nodata is not None) * 2 + 1
    )


def test_an_image_keeps_its_mask_beside_an_unreadable_one(tmp_path: Path, photo: Path, figures: list[Figure]) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    model = model_of(CONFIG)
    losses = []
    for first in (photo, tmp_path / "bad.jpg"):
        subjects, unreadable = read_subjects(held_out_dataset(Files([], [first, photo]), CONFIG), 2)
        losses.append(draw_reconstruction(model, subjects, CONFIG, tmp_path / "a.png", step=0, seed=0))
    assert len(losses[0]) == 2 and losses[0][1:] == pytest.approx(losses[1], rel=1e-4)
    assert [name for name, _ in unreadable] == [str(tmp_path / "bad.jpg")]


def test_images_of_shards_are_named(tmp_path: Path, photo: Path, figures: list[Figure]) -> None:
    item = Encoded("shards/0001.tar/000123.jpg", photo.read_bytes())
    subjects, _ = read_subjects(held_out_dataset(Files([], [item]), CONFIG), 1)
    draw_reconstruction(model_of(CONFIG), subjects, CONFIG, tmp_path / "a.png", step=0, seed=0)
    assert "shards/0001.tar/000123.jpg" in [text.get_text() for text in figures[0].texts]


def test_run_draws_the_same_picture_as_the_command(tmp_path: Path, figures: list[Figure]) -> None:
    images = write_images(tmp_path / "images")
    config = load_config(
        write_config(tmp_path / "c.yaml", images, encoder=RESNET), [f"run.dir={tmp_path / 'run'}", "run.seed=5"]
    )
    pretrain(config)
    run = tmp_path / "run"
    held_out = find_files(config.data).held_out
    last = list_checkpoints(run / "checkpoints")[-1]
    paths = [str(path) for path in held_out]
    assert cli.main(["reconstruct", str(last), *paths, "--seed", "5", "--out", str(tmp_path / "out.png")]) == 0
    assert figures[-1].texts[0].get_text().startswith(f"{RESNET}, step 8, mask ratio 0.6: mean loss ")
    assert {Path(path).name for path in paths} <= {text.get_text() for text in figures[-1].texts}
    assert np.array_equal(
        *(np.asarray(Image.open(path)) for path in (run / "reconstruction.png", tmp_path / "out.png"))
    )


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


def test_model_keeps_its_mode(photo: Path, tmp_path: Path) -> None:
    model = model_of(CONFIG)
    subjects = load_images([photo], CONFIG)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    for training in (True, False):
        model.train(training)
        draw_reconstruction(model, subjects, CONFIG, tmp_path / "a.png", step=0, seed=0)
        assert model.training is training
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
