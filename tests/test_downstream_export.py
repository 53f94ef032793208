"""Exported files, opened by the programs that they are for."""

import json
import sys
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import torchvision
from checkpoints import assert_bitwise, random_like
from classifier_files import fine_tuned, torchvision_resnet
from conftest import TOLERANCE, relative_error
from torch import Tensor, nn

from spark_me.cli import main
from spark_me.downstream import export as export_module

CLASSES = ["ant", "bee", "Käfer"]


@pytest.fixture
def own(tmp_path) -> tuple[Path, nn.Module]:
    """A fine-tuning checkpoint, and the network of its averaged weights."""
    averaged = torchvision_resnet(3, seed=2)
    fine_tuned(tmp_path / "own.pt", CLASSES, ema=averaged)
    return tmp_path / "own.pt", averaged


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


@torch.no_grad()
def assert_same(run, network: nn.Module, height: int, width: int) -> None:
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, height, width)
        assert relative_error(run(images), network(images)) < TOLERANCE[torch.float32]


def by_onnxruntime(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def check_metadata(texts: dict[str, str], height: int, width: int) -> None:
    assert json.loads(texts["classes"]) == CLASSES
    assert json.loads(texts["mean"]) == [0.5] * 3 and json.loads(texts["std"]) == [0.25] * 3
    assert json.loads(texts["image_size"]) == [height, width] and texts["encoder"] == "resnet18"


def test_onnx(own, tmp_path, capsys):
    assert export(own[0], tmp_path / "x.onnx", "--to", "onnx", "--image-size", 64, 96) == 0
    session = by_onnxruntime(tmp_path / "x.onnx")
    assert [(x.name, x.shape[1:]) for x in session.get_inputs()] == [("images", [3, 64, 96])]
    assert [x.name for x in session.get_outputs()] == ["logits"]
    assert_same(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), own[1], 64, 96)
    check_metadata(session.get_modelmeta().custom_metadata_map, 64, 96)
    assert "largest difference to the network" in capsys.readouterr().out


def test_onnx_of_an_encoder_alone_with_global_responses(tmp_path, assert_close):
    network = timm.create_model("convnextv2_atto", num_classes=0).eval()
    state = random_like(network.state_dict())
    network.load_state_dict(state)
    torch.save({key: value for key, value in state.items() if not key.startswith("head.")}, tmp_path / "atto.pth")
    assert export(tmp_path / "atto.pth", tmp_path / "x.onnx", "--to", "onnx", "--image-size", 64, 32) == 0
    session = by_onnxruntime(tmp_path / "x.onnx")
    images = torch.randn(4, 3, 64, 32)
    (features,) = session.run(["features"], {"images": images.numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(features), network.forward_features(images).mean((2, 3)))
    assert "classes" not in session.get_modelmeta().custom_metadata_map


def test_torchscript(own, tmp_path):
    assert export(own[0], tmp_path / "x.pt", "--to", "torchscript") == 0  # the checkpoint's test crop
    texts = {"spark_me.json": ""}
    assert_same(torch.jit.load(tmp_path / "x.pt", _extra_files=texts), own[1], 40, 40)
    check_metadata(json.loads(texts["spark_me.json"]), 40, 40)


def test_torch_export(own, tmp_path):
    assert export(own[0], tmp_path / "x.pt2", "--to", "torch-export", "--image-size", 64, 96) == 0
    texts = {"spark_me.json": ""}
    program = torch.export.load(tmp_path / "x.pt2", extra_files=texts).module()
    assert_same(program, own[1], 64, 96)
    check_metadata(json.loads(texts["spark_me.json"]), 64, 96)


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
@pytest.mark.parametrize("raw", [False, True])
def test_state_dicts(own, tmp_path, layout, raw):
    assert export(own[0], tmp_path / "x.pth", "--to", layout, *(["--raw"] if raw else [])) == 0
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    assert_bitwise(state, (torchvision_resnet(3, seed=1) if raw else own[1]).state_dict())
    libraries = {
        "torchvision": torchvision.models.resnet18,
        "timm": lambda **options: timm.create_model("resnet18", **options),
    }
    libraries[layout](num_classes=3).load_state_dict(state, strict=True)


def test_imagenets_names_travel_too(tmp_path):
    torch.save(torchvision_resnet().state_dict(), tmp_path / "resnet18.pth")
    assert export(tmp_path / "resnet18.pth", tmp_path / "x.ts", "--to", "torchscript", "--image-size", 64, 64) == 0
    texts = {"spark_me.json": ""}
    torch.jit.load(tmp_path / "x.ts", _extra_files=texts)
    assert json.loads(json.loads(texts["spark_me.json"])["classes"])[281] == "tabby"


@pytest.mark.parametrize("wrong, difference", [("nan", "nan"), ("fixed batch", "inf"), ("offset", "1.0e-03")])
def test_a_program_that_differs_is_not_written(own, tmp_path, monkeypatch, capsys, wrong, difference):
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = own[1]

        def forward(self, images: Tensor) -> Tensor:
            logits = self.network(images)
            if wrong == "nan":  # in larger batches alone
                return torch.where(torch.arange(logits.shape[0])[:, None] == 2, torch.nan, logits)
            return logits[:1].expand(2, -1) if wrong == "fixed batch" else logits + 1e-3

    make, suffixes = export_module.PROGRAMS["torchscript"]
    monkeypatch.setitem(
        export_module.PROGRAMS, "torchscript", (lambda network, *others: make(Wrong(), *others), suffixes)
    )
    assert export(own[0], tmp_path / "x.pt", "--to", "torchscript") == 1
    assert f"differs from the network by {difference}, more than 1e-04: nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_name_the_group(own, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert export(own[0], tmp_path / "x.onnx", "--to", "onnx") == 2
    error = capsys.readouterr().err
    assert '".[export]"' in error and error.count("\n") == 1


def test_bad_input_is_one_line(own, tmp_path, capsys):
    for arguments, problem in (
        ([own[0], tmp_path / "x.pt", "--to", "keras"], "--to keras: choose one of onnx, torchscript"),
        ([own[0], tmp_path / "x.pt", "--to", "onnx"], "onnx files end in .onnx"),
        ([own[0], tmp_path / "no" / "x.onnx", "--to", "onnx"], "does not exist: create it first"),
        ([own[0], tmp_path / "x.pt", "--to", "torchscript", "--image-size", 8, 64], "must be at least 32"),
        ([own[0], tmp_path / "x.pth", "--to", "timm", "--image-size", 64, 64], "--image-size is for programs"),
        ([own[0], tmp_path / "x.txt", "--to", "timm"], "cannot tell the format"),
        ([own[0], own[0], "--to", "torchscript"], "own.pt: would replace"),
        ([own[0], own[0], "--to", "timm"], "own.pt: would replace"),
        ([tmp_path / "nowhere.pth", tmp_path / "x.pt", "--to", "torchscript"], "no such file"),
    ):
        assert export(*arguments) == 2
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]
