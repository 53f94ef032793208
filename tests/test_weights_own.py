"""Encoders of one's own, as the README shows them: registered, trained from the command line, and dense again."""

import re
from pathlib import Path

import pytest
import torch
from conftest import randomise
from torch import nn

import spark_me
from spark_me import cli
from spark_me.encoders.registry import ENCODERS, build_encoder, patch_size_of
from spark_me.weights.strict import WeightsError

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def tinynet():
    """The README's code, as it stands there."""
    code = re.search(r"```python\n(# tinynet.py\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(code.group(1), {"__name__": "tinynet"})
    yield
    del ENCODERS["tinynet"]


class DenseTinyNet(nn.Module):
    """What a reader would write for it in torch alone."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, step, stride=step, bias=False),
                nn.GroupNorm(8, outputs),
                nn.GELU(),
                nn.Conv2d(outputs, outputs, 3, padding=1, groups=4),
                nn.SiLU(),
            )
            for inputs, outputs, step in [(3, 32, 4), (32, 64, 2), (64, 128, 2)]
        )

    def forward(self, x):
        return [x := stage(x) for stage in self.stages]


def test_weights_come_back_as_a_dense_networks(tinynet, backend, assert_close):
    model = randomise(
        spark_me.build_model("tinynet", image_size=(32, 48), decoder_width=32, backend=backend).double()
    ).eval()
    dense = DenseTinyNet().double()
    dense.load_state_dict(spark_me.export_weights(model, layout="dense"))
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    for actual, expected in zip(model.encode(images), dense(images), strict=True):
        assert_close(actual, expected)


def test_dense_layout_of_a_built_in_encoder_is_torchvisions():
    model = randomise(spark_me.build_model("resnet18", decoder_width=32))
    theirs = spark_me.export_weights(model, layout="torchvision")
    ours = spark_me.export_weights(model, layout="dense")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_own_weights_load_strictly(tinynet, tmp_path):
    model, other = (randomise(spark_me.build_model("tinynet", image_size=(32, 32), decoder_width=16)) for _ in range(2))
    path = tmp_path / "own.pt"
    torch.save({"model": model.state_dict()}, path)
    assert spark_me.load_weights(other, path).encoder == "TinyNet"
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    state = model.state_dict()
    state["encoder.stages.0.0.weight"] = state.pop("encoder.stages.0.0.kernel")
    with pytest.raises(
        WeightsError, match=r"missing: encoder.stages.0.0.kernel.*unexpected: encoder.stages.0.0.weight"
    ):
        spark_me.load_weights(other, state)


def test_weights_of_a_run_are_dense_again(tinynet, tmp_path, one_thread):
    """What tests/test_readme.py types; here with what becomes of its checkpoint."""
    command = f"""pretrain {README.parent}/configs/demo/pretrain.yaml model.encoder=tinynet run.dir={tmp_path / "run"}
        model.image_size=[48,32] model.decoder_width=16 train.epochs=1 train.batch_size=2 data.repeats=1
        data.workers=0 optim.warmup_epochs=0"""
    assert cli.main(command.split()) == 0
    checkpoint = max((tmp_path / "run" / "checkpoints").iterdir())
    model = spark_me.build_model("tinynet", image_size=(48, 32), decoder_width=16)
    assert spark_me.load_weights(model, checkpoint).encoder == "TinyNet"
    DenseTinyNet().load_state_dict(spark_me.export_weights(model, layout="dense"))


def test_registry_knows_the_total_strides():
    assert all(patch_size_of(name) == build_encoder(name).total_stride for name in ("resnet18", "convnextv2_atto"))


def test_names_and_scales_are_checked(tinynet):
    with pytest.raises(spark_me.UserError, match="'resnet50' exists already"):
        spark_me.register_encoder("resnet50", lambda *_: None, total_stride=32)

    class Odd(spark_me.SparseEncoder):
        strides, channels, total_stride = (4, 16), (8, 8), 16

    spark_me.register_encoder("odd", lambda *_: Odd(), total_stride=16)
    with pytest.raises(spark_me.UserError, match="Odd: strides .* each be half of the next"):
        spark_me.build_model("odd", image_size=(32, 32), decoder_width=16)
    del ENCODERS["odd"]
