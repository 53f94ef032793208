"""Every published layout is recognised and converts to every other; anything that does not fit is named."""

import re

import pytest
import torch
import torchvision
from checkpoints import (
    LAYOUT_FILES,
    WHOLE_MODELS,
    assert_bitwise,
    encoder_of,
    published_shapes,
    random_checkpoint,
    random_like,
)

from spark_me.errors import UserError
from spark_me.networks import empty_network
from spark_me.weights.canonical import from_canonical, to_canonical
from spark_me.weights.expected import WeightsError, shapes_of
from spark_me.weights.layouts import layout_names

UNUSED = ("imn_m", "imn_s", "norm_black")
DEPTHS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def names_only(name, in_channels=3):
    """torchvision's state dict on the meta device: enough where tensors are renamed and not touched."""
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
        network.conv1 = torch.nn.Conv2d(in_channels, 64, 7, bias=False)
    return dict(network.state_dict())


def torchvision_state(name, in_channels=3):
    return random_like(names_only(name, in_channels))


def numbered(shapes):
    """A state dict without memory, whose n-th tensor is filled with n."""
    return {key: torch.tensor(float(n)).expand(shape) for n, (key, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("path", LAYOUT_FILES, ids=lambda path: path.stem)
def test_published_layouts_come_in_and_leave_the_same(path):
    shapes = published_shapes(path)
    state = numbered(shapes)
    weights = to_canonical(state, path.name)
    assert weights.encoder == encoder_of(path)
    expected = "mmpretrain" if path.name.startswith("mmpretrain") else "official"
    # the official encoder files of ResNets bear torchvision's names
    assert weights.layout == ("torchvision" if path.name.endswith("timm_style.tsv.xz") else expected)
    back, layout, notes = from_canonical(weights, expected)
    assert layout.name == expected and back.keys() == state.keys() and notes == ()
    for key, tensor in back.items():
        assert tuple(tensor.shape) == shapes[key], key
        assert key in UNUSED or torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("to", layout_names("resnet18"))
@pytest.mark.parametrize("name", DEPTHS)
def test_round_trips_between_dense_layouts_keep_the_tensors(name, to):
    state = names_only(name)
    there, layout, notes = from_canonical(to_canonical(state, "a"), to)
    back, _, _ = from_canonical(to_canonical(there, "b"), "torchvision")
    if "classifier" not in layout.parts:
        assert notes == (f"classifier head left out: {to} has no place for it", *layout.hints)
        del state["fc.weight"], state["fc.bias"]
    assert list(back) == list(state)
    assert all(back[key] is tensor for key, tensor in state.items())


@pytest.mark.parametrize("path", (WHOLE_MODELS[0], WHOLE_MODELS[-1]), ids=lambda path: path.stem)
@pytest.mark.parametrize("to", ["official", "mmpretrain", "spark_me"])
def test_whole_models_convert_between_layouts_bitwise(path, to):
    first = to_canonical(random_checkpoint(path), "a")
    there, _, notes = from_canonical(first, to)
    assert_bitwise(to_canonical(there, "b").tensors, first.tensors)
    assert not notes and first.parts == {"encoder", "densify", "decoder"} and first.num_classes is None


def test_detectron2_names():
    """As in detectron2's ResNet: stem, res2 to res5, norms under their convolution, shortcut."""
    state, _, _ = from_canonical(to_canonical(names_only("resnet50"), "a"), "detectron2")
    assert state["stem.conv1.weight"].shape == (64, 3, 7, 7)
    assert state["res2.0.shortcut.weight"].shape == (256, 64, 1, 1)
    assert state["res5.0.shortcut.norm.running_var"].shape == (2048,)
    assert state["res4.5.conv2.norm.bias"].shape == (256,)
    expected = {"stem", "res2", "res3", "res4", "res5"}
    assert {key.partition(".")[0] for key in state} == expected
    parts = r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))\.(weight|norm\.(weight|bias|running_\w+|num_\w+))"
    assert all(re.fullmatch(parts, key) for key in state)


@pytest.mark.parametrize("in_channels", [1, 4])
def test_other_stems_convert(in_channels):
    state = torchvision_state("resnet18", in_channels)
    weights = to_canonical(state, "a")
    assert weights.in_channels == in_channels
    assert_bitwise(from_canonical(to_canonical(from_canonical(weights, "mmpretrain")[0], "b"), "timm")[0], state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_training_wrappers_are_dropped(prefix):
    state = torchvision_state("resnet18")
    wrapped = {prefix + key: tensor for key, tensor in state.items()}
    assert_bitwise(from_canonical(to_canonical(wrapped, "a"), "torchvision")[0], state)


def test_files_without_counters_get_zeros_and_say_so():
    state = {k: v for k, v in torchvision_state("resnet18").items() if "num_batches" not in k}
    weights = to_canonical(state, "old.pth")
    assert weights.tensors["encoder.bn1.num_batches_tracked"] == 0
    assert "num_batches_tracked" in weights.notes[0]


@pytest.mark.parametrize("layout", layout_names("resnet50"))
def test_missing_and_unexpected_keys_are_listed_in_the_files_own_names(layout):
    state, _, _ = from_canonical(to_canonical(names_only("resnet50"), "a"), layout)
    key = next(k for k in state if "conv3" in k and k.endswith("weight"))
    state["extra.weight"] = state.pop(key)
    with pytest.raises(WeightsError) as error:
        to_canonical(state, "broken.pth")
    assert error.value.missing == [key]
    assert [name.removeprefix("encoder.") for name in error.value.unexpected] == ["extra.weight"]
    assert "broken.pth: not the tensors of resnet50 in" in str(error.value)
    assert f"1 missing: {key}; 1 unexpected: " in str(error.value) and "\n" not in str(error.value)


def test_a_single_missing_counter_is_an_error():
    state = torchvision_state("resnet18")
    del state["layer1.0.bn1.num_batches_tracked"]
    with pytest.raises(WeightsError, match="1 missing: layer1.0.bn1.num_batches_tracked"):
        to_canonical(state, "a")


def test_half_a_decoder_is_an_error():
    shapes = {k: v for k, v in published_shapes(WHOLE_MODELS[0]).items() if not k.startswith("neck.decoder")}
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with pytest.raises(WeightsError, match="70 missing: .*neck.decoder.0.upsample.weight"):
        to_canonical(state, "a")


def test_two_names_of_one_tensor_are_not_both_taken():
    state, _, _ = from_canonical(to_canonical(torchvision_state("resnet18"), "a"), "mmpretrain")
    state["backbone.fc.weight"] = state["head.fc.weight"]
    with pytest.raises(WeightsError, match="1 unexpected: backbone.fc.weight$"):
        to_canonical(state, "a")


def test_half_a_classifier_is_an_error():
    state = torchvision_state("resnet18")
    del state["fc.weight"]
    with pytest.raises(WeightsError, match="1 missing: fc.weight"):
        to_canonical(state, "a")


def test_wide_resnets_are_named_as_likely_cause():
    with torch.device("meta"):
        state = torchvision.models.wide_resnet50_2().state_dict()
    with pytest.raises(WeightsError) as error:
        to_canonical(state, "wide.pth")
    assert "layer1.0.conv1.weight is 128×64×1×1, needed is 64×64×1×1" in str(error.value)
    assert "Wide ResNet" in str(error.value)


def test_encoder_argument_is_a_check():
    state = names_only("resnet34")
    assert to_canonical(state, "a", encoder="resnet34").encoder == "resnet34"
    with pytest.raises(WeightsError, match="not the tensors of resnet18 in torchvision layout: it holds a resnet34$"):
        to_canonical(state, "a", encoder="resnet18")
    with pytest.raises(UserError, match="unknown encoder 'resnet17': did you mean resnet1"):
        to_canonical(state, "a", encoder="resnet17")


@pytest.mark.parametrize("name", ["timm/resnet26d", "timm/seresnet18"])
def test_layouts_of_resnets_hold_no_network_that_their_readers_do_not_know(name):
    assert layout_names(name) == ["timm", "spark_me"]


@pytest.mark.parametrize("name", ["wide_resnet50_2", "densenet121", "timm/regnety_002"])
def test_other_encoders_are_read_when_they_are_named(name):
    """By their own names and spark_me's; torchvision's other ResNets as all of its ResNets."""
    state = numbered(shapes_of(empty_network(name, num_classes=10)))
    with pytest.raises(UserError):
        to_canonical(state, "a")
    for weights in (to_canonical(state, "a", encoder=name), to_canonical(state, "a", likely=name)):
        assert weights.encoder == name and weights.num_classes == 10 and "encoder" in weights.parts
    own = "timm" if name.startswith("timm/") else "torchvision"
    layouts = layout_names(name)
    assert layouts == (layout_names("resnet18") if "resnet" in name else [own, "spark_me"])
    for layout in ("dense", "spark_me", *(["mmpretrain"] if "resnet" in name else [])):
        there = from_canonical(weights, layout)[0]
        assert (list(there) == list(state)) == (layout == "dense")
        back = from_canonical(to_canonical(there, "b", encoder=name), own)[0]
        assert list(back) == list(state) and all(torch.equal(back[key], tensor) for key, tensor in state.items())
    del state[next(iter(state))]
    with pytest.raises(WeightsError, match=f"a: not the tensors of {name} in {own} layout: 1 missing: "):
        to_canonical(state, "a", encoder=name)


def test_an_unknown_name_in_a_file_does_not_matter_where_its_tensors_say_more():
    assert to_canonical(names_only("resnet18"), "a", likely="nowhere").encoder == "resnet18"
    with pytest.raises(UserError, match="a: unknown encoder 'nowhere'"):
        to_canonical({"x.weight": torch.zeros(1)}, "a", likely="nowhere")


@pytest.mark.parametrize(
    "names",
    [
        "encoder.conv1.kernel encoder.layer1.0.conv1.kernel",
        "conv1.kernel layer1.0.conv1.kernel",
        "encoder.downsample_layers.0.0.kernel encoder.stages.0.0.gamma",
    ],
)
def test_files_of_the_first_version_are_called_that(names):
    with pytest.raises(
        UserError, match=r"a: written by an earlier spark_me .*\.kernel\): convert it with that version"
    ):
        to_canonical({name: torch.zeros(2) for name in names.split()}, "a")


def test_unknown_layouts_are_refused():
    with pytest.raises(UserError, match="x.pth: its tensors follow no known layout .first keys: features.0.weight"):
        to_canonical({"features.0.weight": torch.zeros(1)}, "x.pth")
    with pytest.raises(UserError, match="unknown layout 'keras': choose one of torchvision, timm"):
        from_canonical(to_canonical(torchvision_state("resnet18"), "a"), "keras")
