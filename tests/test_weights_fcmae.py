"""Checkpoints of ConvNeXt V2's own pretraining (FCMAE), whose encoder is on MinkowskiEngine but for its stem."""

from pathlib import Path

import pytest
import timm
import torch
from checkpoints import random_like
from torch import Tensor

import spark_me
from spark_me.cli import main


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    """timm's network in float64, without a classifier."""
    network = timm.create_model("convnextv2_atto", num_classes=0, features_only=False).double().eval()
    network.load_state_dict(random_like(network.state_dict()))
    return network


def fcmae_state(network: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict of ConvNeXt V2's FCMAE class that holds timm's weights.

    By its own conversion to dense networks, backwards: kernels have the offset along the height vary fastest, biases of
    convolutions and parameters of global response norms are rows, layer norms and linear layers lie one name deeper.
    """
    state: dict[str, Tensor] = {}
    for key, tensor in network.state_dict().items():
        if key.startswith("head."):
            continue
        name, leaf = key.rpartition(".")[::2]
        for theirs, ours in (
            ("stem.", "downsample_layers.0."),
            *((f"stages.{i}.downsample.", f"downsample_layers.{i}.") for i in (1, 2, 3)),
            (".blocks.", "."),
            (".conv_dw", ".dwconv"),
            (".mlp.fc", ".pwconv"),
            (".mlp.grn", ".grn"),
        ):
            name = name.replace(theirs, ours)
        if name.endswith("grn"):
            leaf, tensor = {"weight": "gamma", "bias": "beta"}[leaf], tensor[None]
        elif name.endswith("dwconv") or (name.startswith("downsample") and name.endswith(".1") and ".0." not in name):
            if leaf == "bias":
                tensor = tensor[None]
            else:
                leaf, flat = "kernel", tensor.transpose(3, 2).flatten(2)  # [Cout, Cin or 1, K]
                tensor = flat[:, 0].T if name.endswith("dwconv") else flat.permute(2, 1, 0)
        elif "pwconv" in name:
            leaf, tensor = f"linear.{leaf}", tensor.flatten(1) if tensor.dim() > 1 else tensor
        elif not name.startswith("downsample_layers.0."):
            leaf = f"ln.{leaf}"
        state[f"encoder.{name}.{leaf}"] = tensor.contiguous()
    return state


DECODER = {
    "proj.weight": torch.zeros(512, 320, 1, 1),
    "mask_token": torch.zeros(1, 512, 1, 1),
    "decoder.0.grn.gamma": torch.zeros(1, 1, 1, 2048),
    "pred.weight": torch.zeros(3072, 512, 1, 1),
}


@pytest.mark.parametrize("whole", [True, False])
def test_features_are_those_of_the_dense_network(dense: torch.nn.Module, tmp_path: Path, whole: bool) -> None:
    state = fcmae_state(dense)
    if not whole:  # the encoder by itself
        state = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
    torch.save({"model": state | (DECODER if whole else {}), "epoch": 3}, tmp_path / "fcmae.pth")
    model = spark_me.build_model("convnextv2_atto", image_size=(64, 96), decoder_width=32).double().eval()
    loaded = spark_me.load_weights(model, tmp_path / "fcmae.pth")
    assert (loaded.encoder, loaded.layout) == ("convnextv2_atto", "fcmae")
    assert ("decoder left out: fcmae's is of another kind" in loaded.notes) == whole
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dense.forward_intermediates(images, intermediates_only=True)
        for actual, reference in zip(model.encode(images), expected, strict=True):
            assert (actual - reference).abs().max() < 1e-9 * reference.abs().max()


def test_conversion_there_and_back(dense: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = fcmae_state(dense)
    torch.save({"model": expected | DECODER}, tmp_path / "fcmae.pth")
    assert main(["convert", str(tmp_path / "fcmae.pth"), str(tmp_path / "timm.pth"), "--to", "timm"]) == 0
    assert "fcmae" in capsys.readouterr().out
    timms = torch.load(tmp_path / "timm.pth")
    assert all(torch.equal(timms[key], tensor) for key, tensor in dense.state_dict().items() if key in timms)
    assert main(["convert", str(tmp_path / "timm.pth"), str(tmp_path / "back.pth"), "--to", "fcmae"]) == 0
    back = torch.load(tmp_path / "back.pth")["model"]
    assert back.keys() == expected.keys() and all(torch.equal(back[key], expected[key]) for key in back)


def test_what_is_missing_is_said_of_fcmae(dense: torch.nn.Module) -> None:
    state = fcmae_state(dense)
    del state["encoder.stages.0.0.dwconv.kernel"]
    model = spark_me.build_model("convnextv2_atto", image_size=(64, 96), decoder_width=32)
    with pytest.raises(spark_me.UserError, match="fcmae layout") as raised:
        spark_me.load_weights(model, {key: tensor.float() for key, tensor in state.items()})
    assert "encoder.stages.0.0.dwconv.kernel" in str(raised.value)
