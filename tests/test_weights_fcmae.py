"""Checkpoints of ConvNeXt V2's own pretraining (FCMAE), whose encoder is on MinkowskiEngine but for its stem."""

import math
from pathlib import Path

import pytest
import timm
import torch
from checkpoints import assert_bitwise, random_like, random_state
from published_models import FCMAEDecoder, fcmae_loss
from torch import Tensor

import spark_me
from spark_me.cli import main
from spark_me.masked_dense import MaskedDense
from spark_me.masking import patchify


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


DECODER_SHAPES = {
    "mask_token": (1, 512, 1, 1),
    "proj.weight": (512, 320, 1, 1),
    "proj.bias": (512,),
    "decoder.0.dwconv.weight": (512, 1, 7, 7),
    "decoder.0.dwconv.bias": (512,),
    "decoder.0.norm.weight": (512,),
    "decoder.0.norm.bias": (512,),
    "decoder.0.pwconv1.weight": (2048, 512),
    "decoder.0.pwconv1.bias": (2048,),
    "decoder.0.grn.gamma": (1, 1, 1, 2048),
    "decoder.0.grn.beta": (1, 1, 1, 2048),
    "decoder.0.pwconv2.weight": (512, 2048),
    "decoder.0.pwconv2.bias": (512,),
    "pred.weight": (3072, 512, 1, 1),
    "pred.bias": (3072,),
}
"""As published with ConvNeXt V2 Atto, beside the encoder's."""
DECODER = {key: tensor.double() for key, tensor in random_state(DECODER_SHAPES).items()}
LEFT_OUT = "block decoder with mask token left out: the model has none"


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 96, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def block_model(encoder: str = "convnextv2_atto") -> torch.nn.Module:
    return spark_me.build_model(encoder, image_size=(96, 128), decoder="block").double()


@pytest.mark.parametrize("whole", [True, False])
def test_features_are_those_of_the_dense_network(dense: torch.nn.Module, tmp_path: Path, whole: bool) -> None:
    state = fcmae_state(dense)
    if not whole:  # the encoder by itself
        state = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
    torch.save({"model": state | (DECODER if whole else {}), "epoch": 3}, tmp_path / "fcmae.pth")
    model = spark_me.build_model("convnextv2_atto", image_size=(64, 96), decoder_width=32).double().eval()
    loaded = spark_me.load_weights(model, tmp_path / "fcmae.pth")
    assert (loaded.encoder, loaded.layout) == ("convnextv2_atto", "fcmae")
    assert (LEFT_OUT in loaded.notes) == whole
    assert "has no decoder with mask tokens: the model keeps its own" in loaded.notes
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dense.forward_intermediates(images, intermediates_only=True)
        for actual, reference in zip(model.encode(images), expected, strict=True):
            assert (actual - reference).abs().max() < 1e-9 * reference.abs().max()


def test_whole_model_continues_as_published(dense: torch.nn.Module, images: Tensor, visible: Tensor) -> None:
    """Prediction, loss and gradients are those of the published decoder on the masked-dense encoder."""
    state = fcmae_state(dense) | DECODER
    model = block_model()
    loaded = spark_me.load_weights(model, state)
    assert (loaded.encoder, loaded.layout, loaded.notes) == ("convnextv2_atto", "fcmae", ())
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in state.values())

    decoder = FCMAEDecoder(320).double()
    assert {key: tuple(tensor.shape) for key, tensor in decoder.state_dict().items()} == DECODER_SHAPES
    decoder.load_state_dict(DECODER)
    encoder = MaskedDense(dense, [("stages.3", 32)])
    prediction = decoder(encoder(images, visible)[-1], visible)
    actual = patchify(model.predict(images, visible), 32)
    assert (actual - prediction).abs().max() < 1e-9 * prediction.abs().max()

    expected = fcmae_loss(prediction, images, visible)
    loss = model(images, visible)
    assert abs(loss.item() / expected.item() - 1) < 1e-9
    dense.zero_grad()
    expected.backward()
    loss.backward()
    theirs = dict(decoder.named_parameters())
    theirs |= {f"encoder.{name}": p for name, p in dense.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    published = {
        "densify.projection.": "proj.",
        "densify.mask_token": "mask_token",
        "decoder.block.grn.weight": "decoder.0.grn.gamma",
        "decoder.block.grn.bias": "decoder.0.grn.beta",
        "decoder.block.": "decoder.0.",
        "decoder.prediction.": "pred.",
    }
    for name, gradient in gradients.items():
        start = next((ours for ours in published if name.startswith(ours)), "")
        reference = theirs[published.get(start, "") + name.removeprefix(start)].grad.reshape(gradient.shape)
        assert (gradient - reference).abs().max() < 1e-9 * reference.abs().max(), name


@pytest.mark.parametrize("size, channels", [("atto", 320), ("tiny", 768), ("base", 1024)])
def test_numbers_of_parameters_are_the_published_ones(size: str, channels: int) -> None:
    """The classifiers' less their final norm and classifier, and the published decoder beside them."""
    with torch.device("meta"):
        encoder = timm.create_model(f"convnextv2_{size}", num_classes=0)
    beside = sum(math.prod(shape) for shape in DECODER_SHAPES.values()) + 512 * (channels - 320)
    expected = sum(p.numel() for p in encoder.parameters()) - 2 * channels + beside
    model = spark_me.build_model(f"convnextv2_{size}", decoder="block")
    assert sum(p.numel() for p in model.parameters()) == expected


def test_whole_model_there_and_back(dense: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the interface and by `convert`, through spark_me's own layout: bitwise what it was."""
    state = fcmae_state(dense) | DECODER
    model = block_model()
    spark_me.load_weights(model, state)
    back = spark_me.export_weights(model, "fcmae")
    assert back.keys() == state.keys()
    assert_bitwise({key: back[key] for key in state}, state)

    torch.save({"model": state}, tmp_path / "fcmae.pth")
    assert main(["convert", str(tmp_path / "fcmae.pth"), str(tmp_path / "own.pth"), "--to", "spark_me"]) == 0
    assert "left out" not in "".join(capsys.readouterr())
    assert main(["convert", str(tmp_path / "own.pth"), str(tmp_path / "back.pth"), "--to", "fcmae"]) == 0
    back = torch.load(tmp_path / "back.pth")["model"]
    assert_bitwise({key: back[key] for key in state}, state)
    assert main(["convert", str(tmp_path / "own.pth"), str(tmp_path / "timm.pth"), "--to", "official"]) == 0
    assert "block decoder with mask token left out: official has no place for it" in "".join(capsys.readouterr())


def test_a_decoder_of_the_other_kind_is_left_out_and_said(dense: torch.nn.Module) -> None:
    unet = spark_me.build_model("convnextv2_atto", decoder_width=32)
    block = spark_me.build_model("convnextv2_atto", decoder="block", decoder_width=20)
    keep = "the model keeps its own"
    for layout in ("spark_me", "official", "mmpretrain"):
        before = {key: tensor.clone() for key, tensor in block.state_dict().items() if not key.startswith("encoder.")}
        loaded = spark_me.load_weights(block, spark_me.export_weights(unet, layout))
        assert f"has no block decoder with mask token: {keep}" in loaded.notes
        assert "decoder with mask tokens left out: the model has none" in loaded.notes
        assert all(torch.equal(block.state_dict()[key], tensor) for key, tensor in before.items())
    loaded = spark_me.load_weights(unet, spark_me.export_weights(block, "spark_me"))
    assert loaded.notes == (f"has no decoder with mask tokens: {keep}", LEFT_OUT)


def test_an_encoder_alone_starts_a_model_with_the_block_decoder(dense: torch.nn.Module) -> None:
    """As FCMAE's weights are published for download: under the names of the dense network."""
    published = {key: tensor for key, tensor in spark_me.export_weights(dense, "official").items() if key[:4] != "norm"}
    loaded = spark_me.load_weights(block_model(), published)
    assert loaded.notes == ("has no block decoder with mask token: the model keeps its own",)


def test_a_decoder_of_another_depth_is_left_out_and_said(dense: torch.nn.Module) -> None:
    deep = fcmae_state(dense) | random_like(FCMAEDecoder(320, depth=4).state_dict())
    for model in (block_model(), spark_me.build_model("convnextv2_atto", decoder_width=32)):
        loaded = spark_me.load_weights(model, deep)
        assert loaded.layout == "fcmae" and "decoder left out: fcmae's is of another kind" in loaded.notes


def test_half_a_decoder_and_another_width_are_errors(dense: torch.nn.Module) -> None:
    state = fcmae_state(dense) | DECODER
    half = {key: tensor for key, tensor in state.items() if key != "pred.bias"}
    with pytest.raises(spark_me.UserError, match="fcmae layout: 1 missing: pred.bias"):
        spark_me.load_weights(block_model(), half)
    narrow = spark_me.build_model("convnextv2_atto", decoder="block", decoder_width=64)
    with pytest.raises(spark_me.UserError, match=r"likely cause: another decoder width \(decoder_width\)$"):
        spark_me.load_weights(narrow, state)


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
