"""Predictions against a pipeline of torchvision alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from checkpoints import random_like
from classifier_files import by_hand, fine_tuned, save_image, torchvision_resnet
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.transforms import functional

import spark_me
from spark_me.cli import main
from spark_me.downstream.classifier import imagenet_long_names
from spark_me.weights import models


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision_resnet().state_dict(), path)
    return path


@pytest.fixture
def image(tmp_path) -> Path:
    return save_image(tmp_path / "photo.png", seed=5, shape=(300, 411))


@torch.no_grad()
def expected(network: torch.nn.Module, images: Tensor) -> list[tuple[int, float]]:
    scores = network(images).double().softmax(1)[0]
    return [(label, scores[label].item()) for label in scores.argsort(descending=True).tolist()]


@pytest.mark.parametrize("kind", ["path", "text", "PIL", "array", "tensor", "floats"])
def test_equals_torchvisions_pipeline(weights, image, kind):
    decoded = Image.open(image)
    given = {
        "path": image,
        "text": str(image),
        "PIL": decoded,
        "array": np.asarray(decoded),
        "tensor": functional.pil_to_tensor(decoded),
        "floats": functional.to_tensor(decoded),
    }[kind]
    (label, score), *_ = expected(torchvision_resnet(), by_hand(image))
    # Floats are not rounded to 8 bits after resizing.
    tolerance = 0.02 if kind == "floats" else 1e-4
    prediction = spark_me.inference_model(weights, given)
    scores = prediction.pop("pred_scores")
    assert prediction == {
        "pred_label": label,
        "pred_score": pytest.approx(score, rel=tolerance),
        "pred_class": torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"][label],
        "pred_class_long": ImageNetInfo().index_to_description(label),
    }
    assert isinstance(scores, np.ndarray) and scores.shape == (1000,) and scores.dtype == np.float32
    assert scores.argmax() == label and scores.sum() == pytest.approx(1, abs=1e-5)
    assert type(prediction["pred_label"]) is int and type(prediction["pred_score"]) is float


def test_long_names_are_wordnets():
    information = ImageNetInfo()
    assert imagenet_long_names() == [information.index_to_description(index) for index in range(1000)]


def test_a_network_and_a_published_name(weights, image, monkeypatch):
    monkeypatch.setitem(models.PUBLISHED, "resnet18_test", models.Published("resnet18", 1000, str(weights)))
    network = spark_me.get_model("resnet18_test", pretrained=True)
    from_file = spark_me.inference_model(str(weights), image)
    scores = from_file.pop("pred_scores")
    for model in (network, "resnet18_test", spark_me.load_classifier("resnet18_test")):
        prediction = spark_me.inference_model(model, image)
        assert np.array_equal(prediction.pop("pred_scores"), scores) and prediction == from_file
    assert not network.training


def test_convnexts_see_less_of_an_image(tmp_path, image):
    network = timm.create_model("convnextv2_atto", num_classes=1000).eval()
    network.load_state_dict(random_like(network.state_dict()))
    torch.save(network.state_dict(), tmp_path / "atto.pth")
    (label, score), *_ = expected(network, by_hand(image, resize=256))
    for model in (tmp_path / "atto.pth", network):
        prediction = spark_me.inference_model(model, image)
        assert (prediction["pred_label"], prediction["pred_score"]) == (label, pytest.approx(score, rel=1e-4))


def test_top_k(weights, image):
    prediction = spark_me.inference_model(weights, image, top_k=3)
    ranked = prediction.pop("top_k")
    del prediction["pred_scores"]
    assert ranked[0] == prediction
    found = [(row["pred_label"], pytest.approx(row["pred_score"], abs=1e-4)) for row in ranked]
    assert found == expected(torchvision_resnet(), by_hand(image))[:3]
    with pytest.raises(spark_me.UserError, match="top_k=0"):
        spark_me.inference_model(weights, image, top_k=0)


@pytest.mark.parametrize("raw", [False, True])
def test_a_fine_tuned_checkpoint_brings_classes_crop_and_averaged_weights(tmp_path, image, raw, capsys):
    averaged = torchvision_resnet(3, seed=2)
    network = fine_tuned(tmp_path / "own.pt", ["ant", "bee", "cow"], ema=averaged)
    resized = Image.open(image).resize((68, 50), Image.Resampling.BILINEAR)  # 300 × 411, the short edge 50
    pixels = functional.to_tensor(functional.center_crop(resized, 40))[None]
    (label, score), *others = expected(network if raw else averaged, (pixels - 0.5) / 0.25)
    file = tmp_path / "out.json"
    arguments = ["predict", str(tmp_path / "own.pt"), str(image), "--json", str(file), "--top-k", "9"]
    assert main([*arguments, *(["--raw"] if raw else [])]) == 0
    (entry,) = json.loads(file.read_text())
    assert (entry["pred_label"], entry["pred_score"]) == (label, pytest.approx(score, abs=1e-4))
    assert [row["pred_class"] for row in entry["top_k"]] == [["ant", "bee", "cow"][i] for i, _ in [(label, 0), *others]]
    assert f"{entry['pred_score']:.4f}" in capsys.readouterr().out


def test_weights_that_were_not_averaged(tmp_path, image):
    network = fine_tuned(tmp_path / "own.pt", ["ant", "bee"], ema=None, test_resize=40, mean=None, std=None)
    (label, score), *_ = expected(network, by_hand(image, 40, 40))
    prediction = spark_me.inference_model(tmp_path / "own.pt", image)
    assert prediction["pred_label"] == label and prediction["pred_score"] == pytest.approx(score, abs=0.05)


def test_many_images_of_which_some_are_unreadable(weights, tmp_path, capsys):
    folder = tmp_path / "images"
    for seed in range(5):
        save_image(folder / f"{seed % 2}" / f"{seed}.png", seed)
    (folder / "1" / "bad.png").write_bytes(b"no image")
    (folder / "1" / "notes.txt").write_text("not an image's name")
    first, out = save_image(tmp_path / "z.jpg", 9), tmp_path / "out.json"
    arguments = ["predict", str(weights), str(first), str(folder), str(tmp_path / "nowhere.png")]
    assert main([*arguments, "--json", str(out), "--batch-size", "2", "--workers", "1"]) == 1
    entries = json.loads(out.read_text())
    order = [first, *(folder / name for name in ("0/0.png", "0/2.png", "0/4.png", "1/1.png", "1/3.png"))]
    assert [entry.pop("image") for entry in entries] == [str(path) for path in order]
    for entry, path in zip(entries, order):
        alone = spark_me.inference_model(weights, path)
        del alone["pred_scores"]
        assert entry == {**alone, "pred_score": pytest.approx(alone["pred_score"], rel=1e-4)}
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 + len(order)
    lines = [line for line in printed.err.splitlines() if "left out" in line]
    assert [line.partition(":")[0] for line in lines] == [str(folder / "1" / "bad.png"), str(tmp_path / "nowhere.png")]


def test_picture_shows_what_the_network_sees(weights, image, tmp_path):
    sheet = tmp_path / "sheet.png"
    assert main(["predict", str(weights), str(image), str(image), "--picture", str(sheet)]) == 0
    drawn = np.asarray(Image.open(sheet)).astype(int)
    resized = Image.open(image).resize((323, 236), Image.Resampling.BICUBIC)
    crop = np.asarray(functional.center_crop(resized, 224)).astype(int)
    for left in (4, 4 + 224 + 4):
        assert np.abs(drawn[4:228, left : left + 224] - crop).max() <= 1
    assert (drawn[228:, 4:228] < 128).any()  # a caption


def test_runs_without_the_engine_timm_and_omegaconf(weights, image):
    """As in the README: the network by its name, then a prediction."""
    program = """if True:
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("MinkowskiEngine", "MinkowskiEngineBackend", "timm", "omegaconf"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocked())
        sys.modules["tqdm"] = sys.modules["yaml"] = None  # torch asks whether they are there: they are not
        import spark_me
        model = spark_me.get_model("resnet50_spark-pre_300e_in1k")
        prediction = spark_me.inference_model(model, sys.argv[1])
        names = {"pred_label", "pred_score", "pred_scores", "pred_class", "pred_class_long"}
        assert set(prediction) == names, prediction
        spark_me.inference_model(sys.argv[2], sys.argv[1])
        assert not [name for name in sys.modules if name.startswith(("spark_me.train", "spark_me.sparse"))]
    """
    subprocess.run([sys.executable, "-c", program, str(image), str(weights)], check=True)


# Bad input.


def test_images_that_cannot_be_used(weights, tmp_path, capsys):
    classifier = spark_me.load_classifier(weights)
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (20_000, 2)).save(tmp_path / "line.png")
    for image, problem in (
        (tmp_path / "bad.png", "bad.png: unreadable .no image"),
        (tmp_path / "line.png", "line.png: unreadable .too elongated"),
        (np.zeros((8, 8, 4), np.uint8), "the image: unreadable .has 4 channels"),
        (torch.randn(3, 8, 8), "its values lie between"),
        (torch.zeros(1, 3, 8, 8), "has the shape"),
        ([1, 2], "a list, not a path"),
        (Image.new("F", (9, 9)), "not 8 bits"),
    ):
        with pytest.raises(spark_me.UserError, match=problem):
            spark_me.inference_model(classifier, image)
    (tmp_path / "empty").mkdir()
    for arguments, problem in (
        ([tmp_path / "bad.png"], "none of 1 images is readable"),
        ([tmp_path / "empty"], "no images in there"),
        ([tmp_path / "line.png", "--json", tmp_path / "no" / "x.json"], "the folder .* does not exist"),
        ([tmp_path / "line.png", "--picture", tmp_path / "x.gif"], "end the name in .png"),
        ([tmp_path / "line.png", "--device", "abacus"], "--device abacus: not usable here"),
        ([tmp_path / "line.png", "--batch-size", "0"], "batch size 0"),
    ):
        assert main(["predict", str(weights), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert re.search(problem, error) and error.count("\n") == 1, error
