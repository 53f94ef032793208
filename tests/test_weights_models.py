"""Models by name, with files served from this machine."""

import hashlib

import pytest
import torch
import torchvision
from checkpoints import assert_bitwise, random_like
from file_server import serving

import spark_me
from spark_me import networks
from spark_me.weights import models
from spark_me.weights.files import read_state

CLASSIFIER = "resnet50_spark-pre_300e_in1k"


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def checkpoint(tmp_path):
    """A small mmpretrain-like classifier file of ResNet-18: (state dict, bytes, file name with its hash)."""
    state = random_like(torchvision.models.resnet18().state_dict())
    renamed = {("head." if key.startswith("fc.") else "backbone.") + key: value for key, value in state.items()}
    torch.save({"state_dict": renamed, "meta": {}}, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    return state, content, f"resnet18_in1k_20230612-{hashlib.sha256(content).hexdigest()[:8]}.pth"


@pytest.fixture
def published(server, checkpoint, monkeypatch):
    """`resnet18_test`, published on the loopback server."""
    state, content, name = checkpoint
    server.files[name] = content
    monkeypatch.setitem(models.PUBLISHED, "resnet18_test", models.Published("resnet18", 1000, server.url(name)))
    return state


def test_published_weights_are_downloaded_once_and_checked(server, published, checkpoint, cache):
    network = spark_me.get_model("resnet18_test", pretrained=True)
    assert_bitwise(network.state_dict(), published)
    assert [path.name for path in cache.iterdir()] == [checkpoint[2]]
    spark_me.get_model("resnet18_test", pretrained=True)
    assert server.requests == 1


@pytest.mark.parametrize("damage", ["tampered", "cut off", "cut off below its header"])
@pytest.mark.parametrize("hashed", [True, False])
def test_damaged_downloads_are_refused_and_nothing_is_kept(server, published, checkpoint, cache, damage, hashed):
    _, content, name = checkpoint
    name = name if hashed else "plain.pth"
    if damage == "tampered":
        middle = len(content) // 2  # inside some tensor: the file still loads
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        server.files[name] = flipped if hashed else b"not a checkpoint"
    else:
        server.files[name] = content[: len(content) // 2]
        server.promised = len(content) if damage == "cut off below its header" else None
    with pytest.raises(
        spark_me.UserError, match=f"{name}: the download .*not kept|{name}: the download .*nothing was kept"
    ):
        spark_me.get_model("resnet18_test", pretrained=server.url(name))
    assert list(cache.iterdir()) == []


def test_absent_files_and_servers_are_one_line(server, cache):
    for url in (server.url("nothing.pth"), "http://127.0.0.1:1/x.pth"):
        with pytest.raises(spark_me.UserError, match="x.pth: cannot be downloaded|nothing.pth: cannot be downloaded"):
            spark_me.get_model("resnet18", pretrained=url)
        assert not cache.exists() or list(cache.iterdir()) == []


def test_a_cached_file_that_was_changed_is_refused(published, checkpoint, cache):
    cache.mkdir(parents=True)
    (cache / checkpoint[2]).write_bytes(checkpoint[1][:-1])
    with pytest.raises(spark_me.UserError, match="its SHA-256 does not start with .*delete it and try again"):
        spark_me.get_model("resnet18_test", pretrained=True)


def test_urls_load_into_sparse_models_too(server, published, checkpoint, cache):
    model = spark_me.build_model("resnet18", decoder_width=32)
    spark_me.load_weights(model, server.url(checkpoint[2]))
    exported = spark_me.export_weights(model)
    assert_bitwise(exported, {key: published[key] for key in exported})


def test_published_names_and_addresses():
    """As in the publisher's list; the hash in a name is what a download is checked against."""
    folder = "https://download.openmmlab.com/mmpretrain/v1.0/spark/spark_sparse-resnet50_8xb512-amp-coslr-800e_in1k/"
    urls = {name: row.url for name, row in models.PUBLISHED.items()}
    assert len(urls) == 4
    assert urls[CLASSIFIER] == (
        f"{folder}resnet50_8xb256-coslr-300e_in1k/resnet50_8xb256-coslr-300e_in1k_20230612-f86aab51.pth"
    )
    assert urls["spark_sparse-resnet50_800e_in1k"] == (
        f"{folder}spark_sparse-resnet50_8xb512-amp-coslr-800e_in1k_20230612-e403c28f.pth"
    )
    assert [url[-12:-4] for url in urls.values()] == ["e403c28f", "f86aab51", "b0ea712e", "ffc78743"]


def test_every_listed_model_can_be_built(shallow):
    classifiers = {CLASSIFIER, "convnextv2-tiny_spark-pre_300e_in1k"}
    pretrained = {"spark_sparse-resnet50_800e_in1k", "spark_sparse-convnextv2-tiny_800e_in1k"}
    plain = {"resnet18", "resnet200", "convnext_large", "convnextv2_atto", "convnextv2_huge"}
    assert set(spark_me.list_models()) >= classifiers | pretrained | plain
    with torch.device("meta"):
        for name in spark_me.list_models():
            if name in networks._OWN:  # of another test
                continue
            network = spark_me.get_model(name)
            assert not any(module.training for module in network.modules())
            maps = network.feature_maps(torch.empty(1, 3, 64, 32))
            assert [tuple(x.shape[2:]) for x in maps] == [(16, 8), (8, 4), (4, 2), (2, 1)]
            width = maps[-1].shape[1]
            shapes = [tuple(x.shape) for x in network.extract_feat(torch.empty(1, 3, 64, 32))]
            assert shapes == ([(1, width)] if name in classifiers else [tuple(x.shape) for x in maps])
            assert network(torch.empty(2, 3, 64, 64)).shape == (2, 1000 if name in classifiers else width)


@pytest.mark.parametrize("encoder", ["resnet18", "convnext_tiny", "convnextv2_atto"])
def test_extract_feat_of_a_classifier_is_what_its_last_layer_takes(encoder, assert_close):
    network = models.build_network(encoder, num_classes=10).double().eval()
    *_, last = (module for module in network.modules() if isinstance(module, torch.nn.Linear))
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    (features,) = network.extract_feat(images)
    assert_close(last(features), network(images))


def test_images_leave_a_model_as_it_was(checkpoint, tmp_path):
    network = spark_me.get_model("resnet18", pretrained=tmp_path / "x.pth")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    network.extract_feat(torch.randn(1, 3, 64, 64))
    assert_bitwise(network.state_dict(), before)


def test_fine_tuned_resnet50_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in spark_me.get_model(CLASSIFIER).parameters()) == 25_557_032


def test_features_are_torchvisions(checkpoint, tmp_path, assert_close):
    network = torchvision.models.resnet18()
    network.load_state_dict(checkpoint[0])
    dense = spark_me.get_model("resnet18", pretrained=tmp_path / "x.pth")
    network, dense, images = network.double().eval(), dense.double().eval(), torch.randn(2, 3, 64, 96).double()
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    for name, actual in zip(("layer1", "layer2", "layer3", "layer4"), dense.extract_feat(images), strict=True):
        x = getattr(network, name)(x)
        assert_close(actual, x)


def test_a_classifier_without_its_head_keeps_a_random_one_and_says_so(checkpoint, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(models.PUBLISHED, "resnet18_test", models.Published("resnet18", 1000, ""))
    state = {key: value for key, value in read_state(tmp_path / "x.pth").items() if not key.startswith("head.")}
    torch.save(state, tmp_path / "headless.pth")
    spark_me.get_model("resnet18_test", pretrained=str(tmp_path / "headless.pth"))
    assert "has no classifier head: the model keeps its own" in caplog.text


def test_stems_of_other_channels(tmp_path):
    model = spark_me.build_model("resnet18", in_channels=4, decoder_width=32)
    torch.save(model.state_dict(), tmp_path / "four.pth")
    dense = spark_me.get_model("resnet18", pretrained=tmp_path / "four.pth", in_channels=4)
    assert_bitwise(dense.state_dict(), spark_me.export_weights(model))
    with pytest.raises(spark_me.UserError, match="image channels .in_channels"):
        spark_me.get_model("resnet18", pretrained=tmp_path / "four.pth")


@pytest.mark.parametrize(
    "name, pretrained, problem",
    [
        ("resnet5", False, "unknown model 'resnet5': did you mean resnet50"),
        ("vgg", False, "unknown model 'vgg': choose one of spark_sparse-resnet50"),
        ("resnet50", True, f"resnet50: no weights were published by this name: .*{CLASSIFIER}"),
        ("resnet50", "nowhere.pth", "nowhere.pth: no such file"),
    ],
)
def test_bad_names_are_one_line(name, pretrained, problem):
    with pytest.raises(spark_me.UserError, match=problem):
        spark_me.get_model(name, pretrained=pretrained)
