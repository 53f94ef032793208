"""Weights into and out of models, proven by equal outputs in float64."""

import copy
import logging

import pytest
import timm
import torch
import torchvision
from checkpoints import (
    LAYOUT_FILES,
    WHOLE_MODELS,
    assert_bitwise,
    encoder_of,
    random_checkpoint,
    random_like,
)
from published_models import MmpretrainSparK, OfficialSparK, reconstruct
from torch import nn

import spark_me
from spark_me.networks import dense_network
from spark_me.weights.expected import WeightsError

VISIBLE = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[0, 1, 0], [0, 0, 0]]], dtype=torch.bool)


def network_of(name, state):
    """torchvision's network with these weights."""
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    result = network.load_state_dict(state, strict=False, assign=True)
    assert set(result.missing_keys) <= {"fc.weight", "fc.bias"} and not result.unexpected_keys
    return network.eval()


def random_network(name):
    with torch.device("meta"):
        shapes = torchvision.models.get_model(name).state_dict()
    return network_of(name, random_like(shapes))


def features(network, images):
    """Of torchvision's ResNets; timm calls the ReLU act1."""
    x = network.maxpool(torch.relu(network.bn1(network.conv1(images))))
    maps = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        x = getattr(network, name)(x)
        maps.append(x)
    return maps


def images_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_encoder_equals_torchvision_and_timm_at_all_scales(name, assert_close):
    state = random_network(name).state_dict()
    model = spark_me.build_model(name, image_size=(64, 64), decoder_width=32, backend="native")
    loaded = spark_me.load_weights(model, {"module": state})
    assert loaded.encoder == name and "has no decoder" in " ".join(loaded.notes)

    exported = spark_me.export_weights(model, "torchvision")
    assert_bitwise(exported, {key: tensor for key, tensor in state.items() if not key.startswith("fc.")})
    network = network_of(name, exported)  # refuses unexpected keys, and missing ones but the classifier's
    with torch.device("meta"):
        rival = timm.create_model(name)
    result = rival.load_state_dict(spark_me.export_weights(model, "timm"), strict=False, assign=True)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys
    del network.fc, rival.fc  # they have no weights

    images = images_of(2, 3, 64, 32)
    expected = features(network.double(), images)
    for theirs in (model.double().eval().encode(images), features(rival.double().eval(), images)):
        for scale, (actual, map_) in enumerate(zip(theirs, expected, strict=True)):
            assert_close(actual, map_, f"scale {scale}")


@pytest.mark.parametrize(
    "path", [path for path in WHOLE_MODELS if encoder_of(path) == "resnet50"], ids=lambda path: path.stem
)
def test_whole_models_reconstruct_as_the_published_code_would(path, assert_close):
    state = random_checkpoint(path)
    name, official = encoder_of(path), path.name.startswith("official")
    model = spark_me.build_model(name, image_size=(64, 96), decoder_width=768 if official else 512, backend="native")
    loaded = spark_me.load_weights(model, {"module": state, "epoch": 3} if official else {"state_dict": state})
    assert loaded.notes == () and loaded.encoder == name
    published = (OfficialSparK if official else MmpretrainSparK)(name, 768 if official else 512)
    published.load_state_dict(state, strict=True)

    images = images_of(2, 3, 64, 96) * 50 + 110
    actual = model.double().eval().reconstruct(images, VISIBLE)
    with torch.no_grad():
        assert_close(actual.prediction, reconstruct(published.double().eval(), images, VISIBLE))


def test_classifier_files_fill_sparse_and_dense_networks(assert_close):
    (path,) = (path for path in LAYOUT_FILES if path.name.startswith("mmpretrain__resnet50"))
    state = random_checkpoint(path)
    plain = {key.removeprefix("backbone.").removeprefix("head."): tensor for key, tensor in state.items()}
    network = network_of("resnet50", plain).double()
    model = spark_me.build_model("resnet50", image_size=(64, 64), decoder_width=32, backend="native")
    assert any("classifier head left out" in note for note in spark_me.load_weights(model, state).notes)
    dense = spark_me.get_model("resnet50_spark-pre_300e_in1k")
    assert spark_me.load_weights(dense, {"state_dict": state, "meta": {}}).notes == ()

    images = images_of(1, 3, 64, 64)
    expected = features(network, images)
    dense = dense.double().eval()
    for maps in (model.double().eval().encode(images), dense.feature_maps(images)):
        for actual, map_ in zip(maps, expected, strict=True):
            assert_close(actual, map_)
    assert_close(dense(images), network(images))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("layout", ["official", "mmpretrain", "spark_me"])
def test_whole_models_survive_every_layout_bitwise(layout):
    model = spark_me.build_model("resnet18", decoder_width=512)
    model.load_state_dict(random_like(model.state_dict()))
    other = spark_me.build_model("resnet18", decoder_width=512)
    assert spark_me.load_weights(other, spark_me.export_weights(model, layout)).notes == ()
    assert_bitwise(other.state_dict(), model.state_dict())


def test_trainer_checkpoints_load_whatever_else_they_hold():
    model = spark_me.build_model("resnet18", decoder_width=32)
    other = spark_me.build_model("resnet18", decoder_width=32)
    spark_me.load_weights(other, {"model": model.state_dict(), "rng": torch.zeros(3), "optimizer": {}, "step": 7})
    assert_bitwise(other.state_dict(), model.state_dict())


def test_exports_do_not_share_memory_with_the_model():
    model = spark_me.build_model("resnet18", decoder_width=32)
    exported = spark_me.export_weights(model)
    before = copy.deepcopy(exported)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    assert_bitwise(exported, before)


def test_what_stays_initial_is_logged(caplog):
    model = spark_me.build_model("resnet18", decoder_width=32)
    decoder = copy.deepcopy(model.decoder.state_dict())
    with caplog.at_level(logging.WARNING):
        spark_me.load_weights(model, random_network("resnet18").state_dict())
    assert "has no decoder with mask tokens: the model keeps its own" in caplog.text
    assert_bitwise(model.decoder.state_dict(), decoder)


def test_bare_sparse_encoders_load_too():
    encoder = spark_me.build_model("resnet18").encoder
    network = random_network("resnet18")
    spark_me.load_weights(encoder, network.state_dict())
    exported = spark_me.export_weights(encoder)
    assert_bitwise(exported, {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")})


@pytest.mark.parametrize(
    "source, target, problem",
    [
        ({"encoder": "resnet34"}, {}, "the file holds a resnet34, the model is a resnet18"),
        (
            {"in_channels": 1},
            {},
            r"encoder.conv1.weight is 64×1×7×7, needed is 64×3×7×7.*channels .in_channels=1 would",
        ),
        ({"decoder_width": 64}, {}, r"decoder.* needed is .*likely cause: another decoder width .decoder_width"),
    ],
)
def test_models_of_another_shape_are_refused_and_stay_as_they_are(source, target, problem):
    arguments = {"encoder": "resnet18", "decoder_width": 32}
    state = spark_me.build_model(**{**arguments, **source}).state_dict()
    model = spark_me.build_model(**{**arguments, **target})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError, match=problem):
        spark_me.load_weights(model, state)
    assert_bitwise(model.state_dict(), before)


def test_models_of_no_known_layout_are_refused():
    with pytest.raises(spark_me.UserError, match="the model: its tensors follow no known layout"):
        spark_me.export_weights(nn.Linear(2, 2))


class Own(nn.Module):
    """A convnet that nobody registered."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 2, 2))
        self.end = nn.Linear(16, 5)

    def forward(self, x):
        return self.end(self.body(x).mean((2, 3)))


OWN = {"own": Own, "timm": lambda: dense_network("timm/regnety_002"), "wide": lambda: dense_network("wide_resnet50_2")}


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("kind", OWN)
def test_networks_of_no_known_name_load_and_leave_by_their_own_names(kind):
    network = OWN[kind]()
    network.load_state_dict(random_like(network.state_dict()))
    model = spark_me.build_model(OWN[kind](), image_size=(32, 64), decoder_width=32)
    loaded = spark_me.load_weights(model, network.state_dict())
    assert loaded.encoder == getattr(network, "encoder_name", type(network).__name__)
    assert loaded.layout in ("dense", "torchvision", "timm")
    assert loaded.notes == (
        "has no decoder with mask tokens: the model keeps its own",
        "classifier head left out: the model has none",
    )
    exported = spark_me.export_weights(model, "dense")
    assert_bitwise(exported, {key: tensor for key, tensor in network.state_dict().items() if key in exported})
    assert len(exported) == len(network.state_dict()) - 2
    whole = spark_me.export_weights(model, "spark_me")
    assert whole.keys() == model.state_dict().keys()
    other = OWN[kind]()
    notes = spark_me.load_weights(other, whole).notes
    assert notes == (
        "has no classifier head: the model keeps its own",
        "decoder with mask tokens left out: the model has none",
    )
    encoder = spark_me.sparsify(OWN[kind]())
    spark_me.load_weights(encoder, other.state_dict())
    assert_bitwise(dict(encoder.state_dict()), {key: exported[key] for key in encoder.state_dict()})
    if kind == "wide":
        assert "backbone.layer1.0.conv1.weight" in spark_me.export_weights(model, "mmpretrain")
    else:
        own = "timm" if kind == "timm" else "dense"
        with pytest.raises(spark_me.UserError, match=f"'torchvision' has no .*: choose one of {own}, spark_me"):
            spark_me.export_weights(model)
    missing = next(iter(exported))
    with pytest.raises(WeightsError, match=f"1 missing: {missing}"):
        spark_me.load_weights(model, {key: tensor for key, tensor in exported.items() if key != missing})


def test_wrapped_models_load_and_export():
    """As of DistributedDataParallel and torch.compile."""
    model = spark_me.build_model("resnet18", decoder_width=32)
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = model
    network = random_network("resnet18")
    assert spark_me.load_weights(wrapped, network.state_dict()).encoder == "resnet18"
    exported = spark_me.export_weights(wrapped)
    assert_bitwise(exported, {key: network.state_dict()[key] for key in exported})
