"""Features against the networks' own maps, and against the sparse model that a checkpoint is of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import random_like
from classifier_files import by_hand, fine_tuned, save_image, torchvision_resnet
from PIL import Image
from tiny_runs import content_of
from torch.nn import functional

import spark_me
from spark_me.cli import main
from spark_me.config.loading import load_config
from spark_me.downstream.features import load_encoder
from spark_me.downstream.images import over_images
from spark_me.downstream.preprocessing import recipe_preprocessing
from spark_me.train.checkpoint import PRETRAIN, TrainState, write_checkpoint
from spark_me.train.reconstruct import load_images, model_of


@pytest.fixture
def images(tmp_path) -> list[Path]:
    return [save_image(tmp_path / "images" / f"{seed}.png", seed) for seed in range(3)]


@pytest.mark.parametrize("stage", [None, 1, 2, 3, 4])
def test_equal_the_averaged_maps(tmp_path, images, stage, assert_close):
    torch.save(torchvision_resnet().state_dict(), tmp_path / "resnet18.pth")
    out = tmp_path / "f.npz"
    arguments = ["features", str(tmp_path / "resnet18.pth"), str(tmp_path / "images"), "--out", str(out)]
    assert main([*arguments, "--batch-size", "2", *([] if stage is None else ["--stage", str(stage)])]) == 0
    network = spark_me.get_model("resnet18", pretrained=tmp_path / "resnet18.pth").eval().double()
    with torch.no_grad():
        maps = [network.extract_feat(by_hand(path).double())[(stage or 4) - 1] for path in images]
    expected = torch.cat([functional.adaptive_avg_pool2d(x, 1).flatten(1) for x in maps])
    written = np.load(out)
    assert written["features"].dtype == np.float32
    assert_close(torch.from_numpy(written["features"]), expected.float())
    assert written["paths"].tolist() == [str(path) for path in images]
    assert (written["encoder"], written["stage"]) == ("resnet18", stage or 4)


def test_of_a_pretraining_checkpoint_equal_the_sparse_models(tmp_path, images, assert_close):
    """Its own image shape, mean and deviation count, and nothing is hidden."""
    (tmp_path / "c.yaml").write_text(f"data: {{root: {tmp_path / 'images'}, mean: [0.1, 0.2, 0.3], std: [1, 2, 3]}}")
    overrides = ["model.encoder=convnextv2_atto", "model.image_size=[64,96]", "model.decoder_width=32"]
    config = load_config(tmp_path / "c.yaml", overrides)
    model = model_of(config.model)
    model.load_state_dict(random_like(model.state_dict()))
    state = TrainState(model, torch.optim.SGD(model.parameters()), torch.amp.GradScaler(enabled=False), step=4)
    content = content_of(state, config, task=PRETRAIN, steps_per_epoch=4, data_fingerprint="x")
    path = write_checkpoint(tmp_path, content, keep_last=1)
    with torch.no_grad():
        subjects = load_images(images, config.data, config.model, config.run.seed)
        crops = torch.stack([subject.crop.image for subject in subjects])
        *_, deepest = model.eval().encode(crops)
    encoder = load_encoder(path)
    actual = encoder.features(torch.stack([encoder.preprocessing.prepare(image) for image in images]))
    assert encoder.preprocessing.size == (64, 96)
    assert_close(actual, deepest.mean((2, 3)))


def test_of_a_fine_tuned_checkpoint_are_the_averaged_weights(tmp_path, images, assert_close):
    averaged = torchvision_resnet(3, seed=2)
    network = fine_tuned(tmp_path / "own.pt", ["ant", "bee", "cow"], ema=averaged)
    pixels = torch.rand(1, 3, 64, 64)
    for raw, expected in ((False, averaged), (True, network)):
        encoder = load_encoder(tmp_path / "own.pt", raw=raw)
        expected.fc = torch.nn.Identity()
        with torch.no_grad():
            assert_close(encoder.features(pixels), expected(pixels))


def test_unreadable_images_and_bad_input(tmp_path, images, capsys):
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision_resnet().state_dict(), weights)
    images[1].write_bytes(b"no image")
    command = ["features", str(weights), *map(str, images)]
    assert main([*command, "--out", str(tmp_path / "f.npz")]) == 1
    assert np.load(tmp_path / "f.npz")["paths"].tolist() == [str(images[0]), str(images[2])]
    assert f"{images[1]}: unreadable" in capsys.readouterr().err
    for arguments, problem in (
        (["--out", str(tmp_path / "f.txt")], "end the name so"),
        (["--out", str(tmp_path / "no" / "f.npz")], "does not exist: create it first"),
        (["--out", str(tmp_path / "f.npz"), "--stage", "5"], "has stages 1 to 4"),
    ):
        assert main([*command, *arguments]) == 2
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_said(tmp_path, capsys, value):
    paths = [tmp_path / f"{number}\x1b.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (32, 32), (number,) * 3).save(path)
    bad = torch.tensor([0, 1, 0, 1, 0]) == 1
    results = over_images(
        paths,
        recipe_preprocessing(3, resnet=True),
        lambda images: torch.where(bad[: len(images), None], value, torch.zeros(len(images), 2)),
        batch_size=5,
        workers=0,
        what="x",
    )
    assert len(results.rows) == 5
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "finite" in line]
    assert line == f"spark-me: 2 of 5 images give no finite numbers, first {tmp_path}/1\N{REPLACEMENT CHARACTER}.png"
