"""Names and shapes that are expected of checkpoints: those of the dense networks, and of the models built on them."""

import math

import pytest
import torch
from torch import nn

import spark_me
from spark_me import networks
from spark_me.dense import build_network
from spark_me.networks import dense_network
from spark_me.weights.expected import Architecture, Shape, architecture_of, shapes_of


def expected_of(name: str, *parts: str, in_channels: int = 3, width: int = 512, classes: int = 10) -> dict[str, Shape]:
    """What is expected of a file with these parts."""
    architecture = architecture_of(name, in_channels)
    tensors = {f"head.{name}": torch.empty(classes, 0) for name in architecture.classifier if "head" in parts}
    if "decoder" in parts:
        tensors["decoder.blocks.0.conv1.weight"] = torch.empty(width, 0)
    return architecture.expected(tensors)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet200", "convnext_tiny", "convnextv2_atto", "densenet121", "timm/regnety_002"]
)
def test_names_and_shapes_are_the_dense_networks(name: str, in_channels: int) -> None:
    network = dense_network(name, in_channels, num_classes=10)
    expected = expected_of(name, "head", in_channels=in_channels)
    assert [key.partition(".")[2] for key in expected] == list(network.state_dict())
    assert {key.partition(".")[2]: shape for key, shape in expected.items()} == shapes_of(network)
    head = {key for key in expected if key.startswith("head.")}
    without = expected_of(name, in_channels=in_channels)
    assert without == {key: shape for key, shape in expected.items() if key not in head} and head


@pytest.mark.parametrize(
    "name, width, in_channels",
    [
        ("resnet18", 512, 3),
        ("resnet34", 64, 4),
        ("convnext_tiny", 64, 3),
        ("convnextv2_pico", 512, 1),
        ("regnet_y_400mf", 32, 3),
        ("timm/mobilenetv4_conv_small", 64, 3),
    ],
)
def test_names_and_shapes_are_the_sparse_models(name: str, width: int, in_channels: int) -> None:
    """ResNet-18 and ConvNeXtV2-Pico at width 512 have no deepest projection."""
    model = spark_me.build_model(name, decoder_width=width, in_channels=in_channels)
    expected = expected_of(name, "decoder", in_channels=in_channels, width=width)
    assert expected == shapes_of(model)
    assert ("densify.0.projection.weight" in expected) == (name not in ("resnet18", "convnextv2_pico"))


@pytest.mark.parametrize(
    "name, part, parameters",
    [
        ("convnextv2_tiny", "head", 28_635_496),
        ("convnextv2_tiny", "decoder", 39_729_619),
        ("resnet50", "head", 25_557_032),
        ("resnet50", "decoder", 37_970_611),
    ],
)
def test_published_numbers_of_parameters(name: str, part: str, parameters: int) -> None:
    expected = expected_of(name, part, classes=1000)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(math.prod(shape) for key, shape in expected.items() if not key.endswith(statistics)) == parameters


@pytest.mark.parametrize("width", [0, 7, 33, 1 << 40])
def test_a_width_that_no_decoder_has_is_not_tried(width: int) -> None:
    """It comes from a file, whose tensors may have no elements."""
    decoder = {"decoder.blocks.0.conv1.weight": torch.empty(width, 0)}
    shapes = architecture_of("resnet18").expected(decoder)
    assert shapes["decoder.blocks.0.conv1.weight"] == (512, 512, 3, 3)


def test_parts_of_the_head_are_told_apart() -> None:
    def parts(architecture: Architecture) -> dict[str, str]:
        head = architecture.shapes.keys() - architecture.encoder
        return {name: architecture.part_of(f"head.{name}") for name in head}

    norm, end = {"head.norm.weight", "head.norm.bias"}, {"head.fc.weight", "head.fc.bias"}
    convnext = architecture_of("convnextv2_atto")
    assert parts(convnext) == dict.fromkeys(norm, "neck") | dict.fromkeys(end, "classifier")
    assert convnext.texts()["neck"] == "final norm"
    vgg = architecture_of("vgg11_bn")
    assert {name for name, part in parts(vgg).items() if part == "classifier"} == {
        "classifier.6.weight",
        "classifier.6.bias",
    }
    assert vgg.texts()["neck"] == "layers before the classifier"


class Plain(nn.Sequential):
    """Has no classifier, whatever is asked for."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(*(nn.Conv2d(a, b, 3, 2, 1) for a, b in [(in_channels, 8), (8, 16), (16, 24)]))


def test_a_network_without_a_classifier_gets_one_of_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks._OWN, "plain_of_test", Plain)
    for classes in (None, 10):
        network = build_network("plain_of_test", classes)
        expected = expected_of("plain_of_test", *(["head"] if classes else []))
        assert {key.partition(".")[2]: shape for key, shape in expected.items()} == shapes_of(network)
