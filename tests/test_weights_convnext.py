"""ConvNeXt V1 and V2 between all layouts: names, shapes, and what is refused."""

import pytest
import timm
import torch
import torchvision
from checkpoints import assert_bitwise
from convnext_networks import SMALL, V1, assert_same, convert, library_network, random_library_state
from published_convnexts import CONVNEXTS
from torch import nn

import spark_me
from spark_me.weights.canonical import from_canonical, to_canonical
from spark_me.weights.expected import WeightsError
from spark_me.weights.layouts import layout_names


@pytest.mark.parametrize(
    "name, library", [(name, "torchvision") for name in V1] + [(name, "timm") for name in CONVNEXTS]
)
def test_every_size_comes_in_and_leaves_with_the_librarys_names_and_shapes(name, library):
    with torch.device("meta"):
        network = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    state = network.state_dict()
    weights = to_canonical(state, "a")
    assert (weights.encoder, weights.layout) == (name, library)
    back, layout, notes = from_canonical(weights, library)
    assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in state.items()}
    assert layout.name == library and notes == ()


@pytest.mark.parametrize("name", SMALL)
def test_round_trips_are_bitwise_for_all_layouts(name):
    state = random_library_state(name)
    own_layout = "torchvision" if name in V1 else "timm"
    for to in layout_names(name):
        there = convert(state, to)
        assert to_canonical(there, "b").layout == to
        # What pretrains alone has no classifier.
        kept = {key: tensor for key, tensor in state.items() if to != "fcmae" or not key.startswith("head.")}
        assert_same(convert(there, own_layout), kept)


def test_classifiers_need_their_norm():
    state = random_library_state("convnext_tiny")
    del state["classifier.0.weight"], state["classifier.0.bias"]
    with pytest.raises(WeightsError, match="2 missing: classifier.0.weight, classifier.0.bias"):
        to_canonical(state, "a")


@pytest.mark.parametrize(
    "name, layout, problem",
    [
        ("convnextv2_atto", "torchvision", "'torchvision' has no convnextv2_atto: choose one of timm, official"),
        ("convnext_tiny", "detectron2", "'detectron2' has no convnext_tiny: choose one of torchvision, timm"),
    ],
)
def test_layouts_that_cannot_hold_an_encoder_say_so(name, layout, problem):
    with pytest.raises(spark_me.UserError, match=problem):
        convert(library_network(name).state_dict(), layout)


def test_other_encoders_are_named():
    state = library_network("convnext_small").state_dict()
    with pytest.raises(WeightsError, match="not the tensors of convnext_tiny in .* layout: it holds a convnext_small$"):
        to_canonical(state, "a", encoder="convnext_tiny")
    dense = spark_me.get_model("convnext_tiny")
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    for other in ("convnext_small", "convnextv2_tiny"):
        with pytest.raises(WeightsError, match=f"the file holds a {other}, the model is a convnext_tiny"):
            shapes = library_network(other).state_dict()
            spark_me.load_weights(dense, {key: torch.zeros(tensor.shape) for key, tensor in shapes.items()})
    with pytest.raises(WeightsError, match="the file holds a resnet18, the model is a convnext_tiny"):
        spark_me.load_weights(dense, torchvision.models.resnet18().state_dict())
    assert_bitwise(dense.state_dict(), before)


def test_other_widths_are_named():
    with torch.device("meta"):
        state = timm.models.convnext.ConvNeXt(dims=(96, 192, 384, 512)).state_dict()
    with pytest.raises(WeightsError, match="stages.3.downsample.1.weight is 512×384×2×2, needed is 768×384×2×2"):
        to_canonical(state, "a")


@pytest.mark.parametrize(
    "name, key, shape",
    [
        ("convnextv2_atto", "stages.0.blocks.0.mlp.fc1.weight", (160, 40)),
        ("convnextv2_tiny", "stages.0.blocks.0.mlp.fc1.weight", (384, 96, 1, 1)),
        ("convnext_tiny", "features.1.0.layer_scale", (96,)),
    ],
)
def test_sizes_of_one_do_not_matter_when_reading(name, key, shape):
    """timm builds some sizes with 1×1 convolutions and could change its mind; we write what is published today."""
    state = random_library_state(name)
    layout = "torchvision" if name in V1 else "timm"
    assert_same(convert(state | {key: state[key].reshape(shape)}, layout), state)
    with pytest.raises(WeightsError, match=f"{key} is {'×'.join(map(str, shape[1:] + (7,)))}, needed is"):
        to_canonical(state | {key: torch.zeros(*shape[1:], 7)}, "a")


def test_mixed_layouts_are_refused():
    state = library_network("convnext_tiny").state_dict()
    official = convert(state, "official")
    with pytest.raises(WeightsError, match=f"in torchvision layout: {len(official)} unexpected: downsample_layers.0.0"):
        to_canonical(state | official, "a")
    half = {k: v for k, v in state.items() if not k.startswith("features.7.")}
    half |= {k: v for k, v in convert(state, "timm").items() if k.startswith("stages.3.blocks.")}
    with pytest.raises(WeightsError, match="27 missing: features.7.0.layer_scale.*27 unexpected: stages.3.blocks"):
        to_canonical(half, "a")
    head = {key: state[key] for key in state if not key.startswith("classifier.0.")}
    head |= {f"norm.{leaf}": state[f"classifier.0.{leaf}"] for leaf in ("weight", "bias")}
    with pytest.raises(WeightsError, match="2 missing: classifier.0.weight.*2 unexpected: norm.weight, norm.bias"):
        to_canonical(head, "a")


def test_no_encoder_is_taken_for_a_convnext():
    with pytest.raises(spark_me.UserError, match="follow no known layout"):
        to_canonical({"features.0.0.weight": torch.zeros(1)}, "efficientnet.pth")
    with pytest.raises(spark_me.UserError, match="follow no known layout"):
        spark_me.export_weights(nn.Conv2d(3, 3, 3), "timm")
