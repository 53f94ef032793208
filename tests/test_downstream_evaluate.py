"""`spark-me evaluate` against accuracies counted by hand, and what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_finetune import tiny_config, write_classes, write_config

from spark_me import cli
from spark_me.config.loading import to_yaml
from spark_me.weights.models import build_network

CLASSES = [f"class_{number}" for number in range(7)]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Maps of a few pixels."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven classes of noise, of which the last has one image alone."""
    root = write_classes(tmp_path / "images", train=1, val=3, classes=CLASSES)
    generator = np.random.default_rng(1)
    for path in sorted((root / "val").rglob("*.png")):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(path)
    for name in ("1.png", "2.png"):
        (root / "val" / "class_6" / name).unlink()
    return root


def random_classifier(classes: int, seed: int, encoder: str = "resnet18") -> torch.nn.Module:
    torch.manual_seed(seed)
    network = build_network(encoder, classes).eval()
    for name, parameter in network.named_parameters():
        if name == "fc.weight":
            torch.nn.init.normal_(parameter, std=2.0)
    return network


def save_checkpoint(folder: Path, path: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A fine-tuning checkpoint as a run writes it; its weights and their average."""
    network, average = random_classifier(7, 0), random_classifier(7, 1)
    content = {
        "format": "spark_me.finetune",
        "format_version": 2,
        "config": to_yaml(tiny_config(folder, "model.encoder=resnet18")),
        "classes": CLASSES,
        "model": network.state_dict(),
        "ema": average.state_dict(),
        "step": 5,
    }
    torch.save(content, path)
    return network, average


def by_hand(network: torch.nn.Module, root: Path) -> dict[str, float]:
    """Top-1, top-5 and loss, an image at a time, in float64."""
    right, among, losses = 0, 0, []
    paths = [(label, path) for label, name in enumerate(CLASSES) for path in sorted((root / "val" / name).iterdir())]
    for label, path in paths:
        with Image.open(path) as picture:  # 40 × 48: the shorter edge to 36, the centre of 32 × 32
            resized = np.asarray(picture.resize((43, 36), Image.Resampling.BICUBIC), dtype=np.float64)
        crop = (resized[2:34, 6:38] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            (logits,) = network.double()(torch.from_numpy(crop).permute(2, 0, 1)[None]).tolist()
        order = sorted(range(7), key=lambda index: -logits[index])
        right += order[0] == label
        among += label in order[:5]
        losses.append(math.log(sum(math.exp(value) for value in logits)) - logits[label])
    return {"images": len(paths), "top1": right / len(paths), "top5": among / len(paths), "loss": np.mean(losses)}


@pytest.mark.parametrize("raw", [False, True])
def test_figures_are_those_counted_by_hand(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], raw: bool
) -> None:
    network, average = save_checkpoint(tmp_path, tmp_path / "checkpoint.pt")
    expected = by_hand(network if raw else average, images)
    assert 0 < expected["top1"] < expected["top5"] < 1
    command = ["evaluate", str(write_config(tmp_path, "resnet18")), f"weights={tmp_path / 'checkpoint.pt'}"]
    figures, out = tmp_path / "figures.json", tmp_path / "pictures"
    assert cli.main([*command, "--json", str(figures), "--out", str(out), *(["--raw"] if raw else [])]) == 0
    found = json.loads(figures.read_text())
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert [row["class"] for row in found["classes"]] == CLASSES
    assert [row["images"] for row in found["classes"]] == [3, 3, 3, 3, 3, 3, 1]
    confusion = np.asarray(found["confusion"])
    assert confusion.sum(axis=1).tolist() == [3, 3, 3, 3, 3, 3, 1]
    assert confusion.trace() / 19 == pytest.approx(expected["top1"])
    for row, counts in zip(found["classes"], np.diag(confusion)):
        assert row["top1"] == pytest.approx(counts / row["images"])
    with Image.open(out / "confusion.png") as picture:
        assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert f"top-1 {expected['top1']:.2%}, top-5 {expected['top5']:.2%}" in printed
    assert all(name in printed for name in CLASSES)


def test_files_of_other_layouts_have_a_classifier_too(images: Path, tmp_path: Path) -> None:
    network = random_classifier(7, 3)
    state = {f"backbone.{name}": tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    state |= {f"head.{name}": tensor for name, tensor in network.state_dict().items() if name.startswith("fc.")}
    torch.save({"state_dict": state}, tmp_path / "mmpretrain.pth")
    figures = tmp_path / "figures.json"
    command = ["evaluate", str(write_config(tmp_path, "resnet18")), f"weights={tmp_path / 'mmpretrain.pth'}"]
    assert cli.main([*command, "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["top1"] == pytest.approx(by_hand(network, images)["top1"])


def message_of(capsys: pytest.CaptureFixture[str], tmp_path: Path, weights: Path, *overrides: str) -> str:
    capsys.readouterr()
    assert cli.main(["evaluate", str(write_config(tmp_path, "resnet18")), *overrides, f"weights={weights}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_it_refuses(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path, tmp_path / "checkpoint.pt")
    torch.save(random_classifier(5, 0).state_dict(), tmp_path / "five.pth")
    torch.save(build_network("resnet18").state_dict(), tmp_path / "headless.pth")
    torch.save(random_classifier(7, 0, "resnet34").state_dict(), tmp_path / "other.pth")
    assert "has a classifier of 5 classes, the images have 7" in message_of(capsys, tmp_path, tmp_path / "five.pth")
    assert "has no classifier" in message_of(capsys, tmp_path, tmp_path / "headless.pth")
    other = message_of(capsys, tmp_path, tmp_path / "other.pth")
    assert "is a resnet34 of 3 channels, the configuration's a resnet18 of 3" in other
    assert "nowhere.pth: no such file" in message_of(capsys, tmp_path, tmp_path / "nowhere.pth")
    own = tmp_path / "checkpoint.pt"
    assert "is a resnet18 of 3 channels" in message_of(capsys, tmp_path, own, "model.encoder=resnet34")
    for option in (["--out", str(own)], ["--out", str(own / "pictures")], ["--json", str(own)]):
        assert cli.main(["evaluate", str(write_config(tmp_path, "resnet18")), f"weights={own}", *option]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert option[1] in line and ("is a file, not a folder" in line or "would replace" in line)
    (images / "val" / "class_6").rename(images / "val" / "class_7")
    assert "(in one of them alone: class_6, class_7)" in message_of(capsys, tmp_path, own)
    (images / "val" / "class_7").rename(images / "val" / "class_6")
    broken = images / "val" / "class_0" / "0.png"
    broken.write_bytes(b"no image")
    assert "1 of 19 validation images are" in message_of(capsys, tmp_path, own)
    command = ["evaluate", str(write_config(tmp_path, "resnet18")), "data.max_unreadable=0.1", f"weights={own}"]
    assert cli.main(command) == 0
    assert "on 18 images of 7 classes, 1 unreadable ones left out" in capsys.readouterr().out
