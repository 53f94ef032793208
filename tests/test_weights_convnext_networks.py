"""ConvNeXt V1 and V2 into and out of networks, proven by equal outputs of independent networks in float64."""

import sys

import pytest
import timm
import torch
from checkpoints import (
    LAYOUT_FILES,
    assert_bitwise,
    encoder_of,
    is_resnet,
    published_shapes,
    random_checkpoint,
    random_like,
)
from convnext_networks import (
    SMALL,
    V1,
    assert_same,
    convert,
    filled,
    images_of,
    library_features,
    library_network,
    random_library_state,
)
from published_convnexts import CONVNEXTS, PublishedConvNeXt
from torch.nn import functional

import spark_me
from spark_me.cli import main
from spark_me.weights.files import card_of, read_content, read_state
from spark_me.weights.layouts import layout_names


@pytest.mark.parametrize("name", V1[:2])
def test_torchvisions_weights_are_timms_in_timms_network(name, assert_close):
    """Two independent libraries agree on the logits."""
    state = random_library_state(name)
    with torch.device("meta"):
        rival = timm.create_model(name)
    rival = filled(rival, convert(state, "timm"))
    network = filled(library_network(name), state)
    images = images_of(2, 3, 64, 32)
    assert_close(rival(images), network(images))


@pytest.mark.parametrize("name, layout", [(name, layout) for name in SMALL for layout in layout_names(name)])
def test_our_dense_networks_equal_the_librarys(name, layout, assert_close, tmp_path):
    state = random_library_state(name)
    network = filled(library_network(name), state)
    torch.save(convert(state, layout), tmp_path / "x.pth")
    dense = spark_me.get_model(name, pretrained=tmp_path / "x.pth").double().eval()
    images = images_of(2, 3, 64, 32)
    expected = library_features(network, images)
    for scale, (actual, map_) in enumerate(zip(dense.extract_feat(images), expected, strict=True)):
        assert_close(actual, map_, f"scale {scale}")
    assert_close(dense(images), expected[-1].mean((2, 3)))


@pytest.mark.parametrize("names", ["official", "mmpretrain"])
@pytest.mark.parametrize("name", SMALL)
def test_exports_fill_networks_of_the_published_names(name, names, assert_close):
    """An independent network with the published names, nothing masked, gives the library's features."""
    state = random_library_state(name)
    exported = convert(state, names)
    head = {
        "official": ["norm.weight", "norm.bias", "head.weight", "head.bias"],
        "mmpretrain": ["backbone.norm3.weight", "backbone.norm3.bias", "head.fc.weight", "head.fc.bias"],
    }[names]
    encoder = {key.removeprefix("backbone."): tensor for key, tensor in exported.items() if key not in head}
    published = filled(PublishedConvNeXt(name, names), encoder)
    images = images_of(2, 3, 64, 32)
    network = filled(library_network(name), state)
    maps = published(images, torch.ones(2, 2, 1, dtype=torch.bool))
    for actual, map_ in zip(maps, library_features(network, images), strict=True):
        assert_close(actual, map_)
    norm_weight, norm_bias, weight, bias = (exported[key].double() for key in head)
    pooled = functional.layer_norm(maps[-1].mean((2, 3)), norm_weight.shape, norm_weight, norm_bias, eps=1e-6)
    assert_close(functional.linear(pooled, weight, bias), network(images))


@pytest.mark.parametrize("in_channels", [1, 4])
@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_other_stems_convert(name, in_channels, tmp_path):
    dense = spark_me.get_model(name, in_channels=in_channels)
    state = dense.state_dict()
    sparse = convert(state, "spark_me")
    stem = "features.0.0.weight" if name in V1 else "stem.0.weight"
    assert sparse[f"encoder.{stem}"].shape == (CONVNEXTS[name][2][0], in_channels, 4, 4)
    torch.save(sparse, tmp_path / "x.pth")
    again = spark_me.get_model(name, pretrained=tmp_path / "x.pth", in_channels=in_channels)
    assert_bitwise(again.state_dict(), state)
    with pytest.raises(spark_me.UserError, match="image channels .in_channels"):
        spark_me.get_model(name, pretrained=tmp_path / "x.pth")


def test_published_classifier_gives_timms_logits(tmp_path, assert_close):
    (path,) = (path for path in LAYOUT_FILES if path.name.startswith("mmpretrain__convnextv2-tiny"))
    state = random_checkpoint(path)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "x.pth")
    dense = spark_me.get_model("convnextv2-tiny_spark-pre_300e_in1k", pretrained=tmp_path / "x.pth").double().eval()
    assert sum(p.numel() for p in dense.parameters()) == 28_635_496
    with torch.device("meta"):
        network = timm.create_model("convnextv2_tiny")
    network = filled(network, spark_me.export_weights(dense, "timm"))
    images = images_of(2, 3, 64, 32)
    assert_close(dense(images), network(images))
    for key, tensor in spark_me.export_weights(dense, "mmpretrain").items():
        assert torch.equal(tensor, state[key].double()), key


@pytest.mark.parametrize("path", [path for path in LAYOUT_FILES if not is_resnet(path)], ids=lambda path: path.stem)
def test_published_files_fill_dense_networks(path, caplog):
    """Names, shapes and what is left out, without memory; values are compared elsewhere."""
    name = encoder_of(path)
    with torch.device("meta"):
        dense = spark_me.get_model(name)
        state = {key: torch.empty(shape) for key, shape in published_shapes(path).items()}
    loaded = spark_me.load_weights(dense, state)
    assert loaded.encoder == name
    head = "300e" in path.name
    assert ("decoder with mask tokens left out: the model has none" in loaded.notes) == (
        "withdecoder" in path.name or "spark_sparse" in path.name
    )
    assert ("final norm left out: the model has none" in loaded.notes) == head
    assert ("classifier head left out: the model has none" in loaded.notes) == head


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_a_final_norm_comes_alone_too(name, tmp_path):
    """timm's networks without classes keep it."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    state = random_like(network.state_dict())
    dense = spark_me.get_model(name)
    assert spark_me.load_weights(dense, state).notes == ("final norm left out: the model has none",)
    network = filled(network, state)
    assert spark_me.load_weights(network, random_library_state(name)).notes == (
        "classifier head left out: the model has none",
    )


def test_timm_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(spark_me.UserError, match=r"convnextv2_atto needs timm: run `pip install -e \"\.\[train\]\"`"):
        spark_me.get_model("convnextv2_atto")
    assert spark_me.get_model("convnext_tiny").num_classes is None


def test_command_line_converts_and_refuses_in_one_line(tmp_path, capsys):
    state = random_library_state("convnext_tiny")
    torch.save(state, tmp_path / "x.pth")
    ours, back = str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pth")
    assert main(["convert", str(tmp_path / "x.pth"), ours, "--to", "spark_me", "--encoder", "convnext_tiny"]) == 0
    assert main(["convert", ours, back, "--to", "torchvision"]) == 0
    assert "convnext_tiny from torchvision to spark_me layout" in capsys.readouterr().out
    assert card_of(tmp_path / "back.pth", read_content(tmp_path / "back.pth"))["encoder"] == "convnext_tiny"
    assert_same(read_state(tmp_path / "back.pth"), state)
    assert main(["convert", ours, str(tmp_path / "no.pth"), "--to", "detectron2"]) == 2
    error = capsys.readouterr().err
    assert "layout 'detectron2' has no convnext_tiny" in error and error.count("\n") == 1
    assert not (tmp_path / "no.pth").exists()
