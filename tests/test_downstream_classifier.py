"""What is a classifier and what is not."""

from pathlib import Path

import pytest
import timm
import torch
from classifier_files import fine_tuned, save_image, torchvision_resnet

import spark_me
from spark_me.cli import main


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision_resnet().state_dict(), path)
    return path


@pytest.fixture
def image(tmp_path) -> Path:
    return save_image(tmp_path / "photo.png", seed=5, shape=(300, 411))


def test_class_names_are_imagenets(weights):
    classes = spark_me.load_classifier(weights).classes
    assert len(classes) == 1000
    assert (classes[0], classes[281], classes[999]) == ("tench", "tabby", "toilet tissue")


def test_bad_models_are_one_line(weights, tmp_path, image, capsys):
    state = torch.load(weights, weights_only=True)
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, tmp_path / "encoder.pth")
    torch.save(torchvision_resnet(12).state_dict(), tmp_path / "twelve.pth")
    torch.save({**state, "fc.weight": torch.zeros(7, 512)}, tmp_path / "torn.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    fine_tuned(tmp_path / "short.pt", ["ant", "bee"], ema=torchvision_resnet(3))
    fine_tuned(tmp_path / "no_crop.pt", ["ant", "bee"], ema=None, test_crop=None)
    fine_tuned(tmp_path / "mean.pt", ["ant", "bee"], ema=None, mean=[0.5])
    for name, problem in (
        ("encoder.pth", "holds an encoder alone: fine-tune it first"),
        ("twelve.pth", "its 12 classes have no names"),
        ("torn.pth", "fc.bias is 1000"),
        ("other.pth", "no known layout"),
        ("short.pt", "names 2 classes, its classifier has 3"),
        ("no_crop.pt", "data.test_crop"),
        ("mean.pt", "not of its 3 channels"),
        ("nowhere.pth", "no such file"),
    ):
        assert main(["predict", str(tmp_path / name), str(image)]) == 2
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") == 1 and name in error, error


@pytest.mark.parametrize(
    "name, problem",
    [
        (
            "resnet50_spark-pre_300e",
            "resnet50_spark-pre_300e: neither a file nor .*did you mean resnet50_spark-pre_300e_",
        ),
        ("resnet50", "resnet50: no weights were published by this name"),
    ],
)
def test_unknown_names(name, problem, image):
    with pytest.raises(spark_me.UserError, match=problem):
        spark_me.inference_model(name, image)


def test_networks_without_fitting_classes(image):
    with pytest.raises(spark_me.UserError, match="the network holds an encoder alone: fine-tune it first"):
        spark_me.inference_model(spark_me.get_model("resnet18"), image)
    with pytest.raises(spark_me.UserError, match="the network gives 12 numbers an image for 3 class names"):
        spark_me.inference_model(torchvision_resnet(12), image, class_names=["a", "b", "c"])
    with pytest.raises(spark_me.UserError, match="the network's 10 classes have no names"):
        spark_me.load_classifier(timm.create_model("convnextv2_atto", num_classes=10))
