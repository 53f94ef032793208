"""Weights into and out of sparse ConvNeXts, proven by equal outputs in float64."""

import pytest
import timm
import torch
from checkpoints import (
    WHOLE_MODELS,
    assert_bitwise,
    encoder_of,
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
from published_models import MmpretrainSparK, OfficialSparK, reconstruct

import spark_me
from spark_me.weights.expected import WeightsError

VISIBLE = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[0, 1, 0], [0, 0, 0]]], dtype=torch.bool)
CLASSIFIERS = ("head.", "classifier.")


def test_convnextv2_tiny_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in spark_me.build_model("convnextv2_tiny").parameters()) == 39_729_619


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", SMALL)
def test_encoder_equals_the_libraries_at_all_scales(name, backend, assert_close):
    state = random_library_state(name)
    model = spark_me.build_model(name, image_size=(64, 64), decoder_width=32, backend=backend)
    loaded = spark_me.load_weights(model, state)
    assert loaded.encoder == name and "has no decoder" in " ".join(loaded.notes)
    own_layout = "torchvision" if name in V1 else "timm"
    assert_same(
        spark_me.export_weights(model, own_layout),
        {key: tensor for key, tensor in state.items() if not key.startswith(CLASSIFIERS)},
    )
    with torch.device("meta"):
        rival = timm.create_model(name)
    result = rival.load_state_dict(spark_me.export_weights(model, "timm"), strict=False, assign=True)
    assert set(result.missing_keys) == {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}
    assert not result.unexpected_keys
    del rival.head  # it has no weights

    images = images_of(2, 3, 64, 32)
    expected = library_features(filled(library_network(name), state), images)
    for maps in (model.double().eval().encode(images), library_features(rival.double().eval(), images)):
        for scale, (actual, map_) in enumerate(zip(maps, expected, strict=True)):
            assert_close(actual, map_, f"scale {scale}")


@pytest.mark.parametrize(
    "path",
    [path for path in WHOLE_MODELS if encoder_of(path) in ("convnext_small", "convnextv2_tiny")],
    ids=lambda path: path.stem,
)
def test_whole_models_reconstruct_as_the_published_code_would(path, assert_close):
    state = random_checkpoint(path)
    name, official = encoder_of(path), path.name.startswith("official")
    model = spark_me.build_model(name, image_size=(64, 96), decoder_width=768 if official else 512, backend="native")
    loaded = spark_me.load_weights(model, {"module": state, "epoch": 3} if official else {"state_dict": state})
    assert loaded.notes == () and loaded.encoder == name
    published = (OfficialSparK if official else MmpretrainSparK)(name, 768 if official else 512)
    published.load_state_dict(state, strict=True, assign=True)

    images = images_of(2, 3, 64, 96) * 50 + 110
    actual = model.double().eval().reconstruct(images, VISIBLE)
    with torch.no_grad():
        assert_close(actual.prediction, reconstruct(published.double().eval(), images, VISIBLE))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("layout", ["official", "mmpretrain", "spark_me"])
@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_whole_models_survive_every_layout_bitwise(name, layout):
    model = spark_me.build_model(name, decoder_width=320)
    model.load_state_dict(random_like(model.state_dict()))
    other = spark_me.build_model(name, decoder_width=320)
    assert spark_me.load_weights(other, spark_me.export_weights(model, layout)).notes == ()
    assert_bitwise(other.state_dict(), model.state_dict())


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_bare_sparse_encoders_load_too(name):
    encoder = spark_me.build_model(name).encoder
    state = random_library_state(name)
    spark_me.load_weights(encoder, state)
    expected = {key: tensor for key, tensor in state.items() if not key.startswith(CLASSIFIERS)}
    assert_same(spark_me.export_weights(encoder, "torchvision" if name in V1 else "timm"), expected)
    again = spark_me.build_model(name).encoder
    spark_me.load_weights(again, encoder.state_dict())
    assert_bitwise(again.state_dict(), encoder.state_dict())


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_pretrained_models_leave_as_dense_networks(name, tmp_path, assert_close):
    model = spark_me.build_model(name, image_size=(64, 64), decoder_width=32)
    model.load_state_dict(random_like(model.state_dict()))
    torch.save({"model": model.state_dict(), "step": 3}, tmp_path / "x.pth")
    dense = spark_me.get_model(name, pretrained=tmp_path / "x.pth").double().eval()
    images = images_of(2, 3, 64, 32)
    for actual, expected in zip(dense.extract_feat(images), model.double().eval().encode(images), strict=True):
        assert_close(actual, expected)


@pytest.mark.usefixtures("shallow")
def test_models_of_another_shape_are_refused_and_stay_as_they_are():
    model = spark_me.build_model("convnextv2_atto", decoder_width=32)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ours = convert(random_library_state("convnextv2_femto"), "spark_me")
    with pytest.raises(WeightsError, match="the file holds a convnextv2_femto, the model is a convnextv2_atto"):
        spark_me.load_weights(model, ours)
    wide = spark_me.build_model("convnextv2_atto", decoder_width=64).state_dict()
    with pytest.raises(WeightsError, match=r"likely cause: another decoder width .decoder_width"):
        spark_me.load_weights(model, wide)
    assert_bitwise(model.state_dict(), before)
