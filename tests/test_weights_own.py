"""Weights of networks of one's own, registered by a name: their own names and shapes, everywhere."""

import pytest
import torch
from conftest import randomise
from torch import nn

import spark_me
from spark_me import cli, networks
from spark_me.dense import build_network
from spark_me.weights.expected import WeightsError
from spark_me.weights.files import card_of, read_content


class TinyNet(nn.Module):
    """As a reader would write it."""

    def __init__(self, in_channels: int = 3, num_classes: int | None = None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, step, stride=step, bias=False),
                nn.GroupNorm(8, outputs),
                nn.GELU(),
                nn.Conv2d(outputs, outputs, 3, padding=1, groups=4),
                nn.SiLU(),
            )
            for inputs, outputs, step in [(in_channels, 32, 4), (32, 64, 2), (64, 128, 2)]
        )
        self.classifier = nn.Linear(128, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def tinynet(monkeypatch):
    monkeypatch.setitem(networks._OWN, "tinynet", TinyNet)


def test_weights_come_back_as_a_dense_networks(backend, assert_close):
    model = randomise(
        spark_me.build_model("tinynet", image_size=(32, 48), decoder_width=32, backend=backend).double()
    ).eval()
    dense = TinyNet().double()
    dense.load_state_dict(spark_me.export_weights(model, layout="dense"))
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    x = images
    for stage, actual in zip(dense.stages, model.encode(images), strict=True):
        x = stage(x)
        assert_close(actual, x)


def test_dense_layout_of_a_built_in_encoder_is_torchvisions():
    model = randomise(spark_me.build_model("resnet18", decoder_width=32))
    theirs = spark_me.export_weights(model, layout="torchvision")
    ours = spark_me.export_weights(model, layout="dense")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_own_weights_load_strictly(tmp_path):
    model, other = (randomise(spark_me.build_model("tinynet", image_size=(32, 32), decoder_width=16)) for _ in range(2))
    path = tmp_path / "own.pt"
    torch.save({"model": model.state_dict()}, path)
    loaded = spark_me.load_weights(other, path)
    assert loaded == ("tinynet", "spark_me", ())
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    state = model.state_dict()
    state["encoder.stages.0.0.kernel"] = state.pop("encoder.stages.0.0.weight")
    with pytest.raises(spark_me.UserError, match="written by an earlier spark_me .*encoder.stages.0.0.kernel"):
        spark_me.load_weights(other, state)
    state["encoder.stages.0.0.weights"] = state.pop("encoder.stages.0.0.kernel")
    with pytest.raises(
        WeightsError, match="1 missing: encoder.stages.0.0.weight; 1 unexpected: encoder.stages.0.0.weights"
    ):
        spark_me.load_weights(other, state)


def test_classifiers_come_and_go(tmp_path, caplog):
    network = randomise(build_network("tinynet", num_classes=7))
    torch.save(network.state_dict(), tmp_path / "x.pth")
    model = spark_me.build_model("tinynet", image_size=(32, 32), decoder_width=16)
    assert "classifier head left out: the model has none" in spark_me.load_weights(model, tmp_path / "x.pth").notes
    other = build_network("tinynet", num_classes=7)
    notes = spark_me.load_weights(other, model.state_dict()).notes
    assert "has no classifier head: the model keeps its own" in notes
    assert spark_me.load_weights(other, tmp_path / "x.pth").notes == ()
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), network.state_dict().values()))
    with pytest.raises(WeightsError, match="a classifier of 7 classes instead of 5"):
        spark_me.load_weights(build_network("tinynet", num_classes=5), tmp_path / "x.pth")


@pytest.mark.parametrize("channels", [1, 3])
def test_files_say_whose_they_are(tmp_path, capsys, channels):
    """By configuration or model card, where nobody registered the network under which its names would be found."""
    model = spark_me.build_model("timm/regnety_002", in_channels=channels, decoder_width=32)
    config = f"model: {{encoder: timm/regnety_002, in_channels: {channels}}}"
    torch.save({"format": "spark_me.pretrain", "model": model.state_dict(), "config": config}, tmp_path / "x.pt")
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    steps = [("x.pt", "a.safetensors", "timm"), ("a.safetensors", "b.pth", "spark_me"), ("b.pth", "c.pth", "dense")]
    for source, target, layout in steps:
        assert cli.main(["convert", str(tmp_path / source), str(tmp_path / target), "--to", layout]) == 0
        assert f"timm/regnety_002 from {'timm' if source == 'a.safetensors' else 'spark_me'}" in capsys.readouterr().out
        assert card_of(tmp_path / target, read_content(tmp_path / target))["encoder"] == "timm/regnety_002"
    final = torch.load(tmp_path / "c.pth")
    assert final.keys() == model.encoder.state_dict().keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in model.encoder.state_dict().items())
    command = ["convert", str(tmp_path / "plain.pth"), str(tmp_path / "d.pth"), "--to", "timm"]
    assert cli.main(command) == 2
    assert "follow no known layout" in capsys.readouterr().err
    assert cli.main([*command, "--encoder", "timm/regnety_002"]) == 0
