"""Probes against scikit-learn and plain loops."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier_files import save_image, torchvision_resnet
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from spark_me.cli import main
from spark_me.data.class_folders import balanced_places
from spark_me.downstream.probe import (
    STRENGTHS,
    count_correct,
    linear_probe,
    nearest_neighbours,
)


def blobs(images: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, 12))
    labels = np.arange(images) % classes
    features = centres[labels] + generator.normal(size=(images, 12)) * np.linspace(0.1, 3, 12)
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_nearest_neighbours_vote_as_in_scikit_learn():
    (train, labels), (test, _) = blobs(70, 7, seed=0), blobs(1500, 7, seed=1)
    votes = nearest_neighbours(train, labels, test, 7, k=9)
    model = KNeighborsClassifier(9, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = model.fit(train.double().numpy(), labels.numpy()).predict_proba(test.double().numpy())
    np.testing.assert_allclose(votes.numpy(), expected, atol=1e-4)


def test_linear_probe_is_logistic_regression_on_standardised_features():
    (train, labels), (test, _) = blobs(90, 3, seed=0), blobs(40, 3, seed=1)
    result = linear_probe(train, labels, test, seed=4)
    x, y = train.double().numpy(), labels.numpy()
    held_out = balanced_places(y.tolist(), 0.2, 4)
    kept = [place for place in range(90) if place not in held_out]

    def fit(rows: list[int] | slice, strength: float) -> tuple[LogisticRegression, np.ndarray, np.ndarray]:
        mean, std = x[rows].mean(0), x[rows].std(0)
        model = LogisticRegression(C=strength, max_iter=1000).fit((x[rows] - mean) / std, y[rows])
        return model, mean, std

    correct = {}
    for strength in STRENGTHS:
        model, mean, std = fit(kept, strength)
        correct[strength] = (model.predict((x[held_out] - mean) / std) == y[held_out]).sum()
    best = min(strength for strength in STRENGTHS if correct[strength] == max(correct.values()))
    assert len(set(correct.values())) > 1  # it matters which is chosen
    model, mean, std = fit(slice(None), best)
    assert (result.strength, result.chosen) == (best, True)
    expected = model.predict_proba((test.double().numpy() - mean) / std)
    np.testing.assert_allclose(result.scores.numpy(), expected, atol=1e-6)


def test_linear_probe_of_one_image_a_class_does_not_choose():
    train, labels = blobs(5, 5, seed=0)
    result = linear_probe(train, labels, train, seed=0)
    assert (result.strength, result.chosen) == (1.0, False)
    assert result.scores.argmax(1).tolist() == labels.tolist()


def test_counting_correct_ones_by_a_loop():
    scores = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 8
    for top in (1, 5):
        expected = sum(labels[i] in scores[i].topk(top).indices for i in range(50))
        assert count_correct(scores, labels, top) == expected
    assert count_correct(torch.zeros(4, 8), torch.tensor([0, 4, 5, 7]), 5) == 2  # of equal scores the first


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """ImageNet's layout: train/CLASS and val/CLASS, 7 classes of 6 and 3 images that are alike within a class."""
    root = tmp_path_factory.mktemp("data")
    torch.save(torchvision_resnet().state_dict(), root / "resnet18.pth")
    for split, images in (("train", 6), ("val", 3)):
        for label in range(7):
            for number in range(images):
                shape = (40 + 5 * (number % 2), 50 + number)
                save_image(root / split / f"class{label}" / "deep" / f"{number}.png", label, shape)
    return root


def run_probe(folders: Path, *arguments: object) -> int:
    command = ["probe", folders / "resnet18.pth", "--train", folders / "train", "--test", folders / "val", *arguments]
    return main([str(argument) for argument in command])


def test_command_equals_scikit_learn_on_the_features(folders, tmp_path, capsys):
    assert run_probe(folders, "--json", tmp_path / "p.json", "--k", "4", "--fraction", "0.5", "--seed", "3") == 0
    figures = json.loads((tmp_path / "p.json").read_text())
    features = {}
    for split in ("train", "val"):
        out = tmp_path / "f.npz"
        main(["features", str(folders / "resnet18.pth"), str(folders / split), "--out", str(out)])
        features[split] = np.load(out)["features"], np.array([Path(p).parts[-3] for p in np.load(out)["paths"]])
    (x, y), (test, expected) = features["train"], features["val"]
    part = balanced_places(np.unique(y, return_inverse=True)[1].tolist(), 0.5, 3)
    model = KNeighborsClassifier(4, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    correct = int((model.fit(x[part], y[part]).predict(test) == expected).sum())
    assert (figures["train_images"], figures["test_images"], figures["classes"]) == (21, 21, 7)
    assert figures["knn"]["top1_correct"] == correct and figures["knn"]["top1"] == pytest.approx(correct / 21)
    assert figures["knn"]["top5_correct"] >= correct
    assert figures["linear"]["top1_correct"] >= 18  # near duplicates; chance is 3
    assert math.log10(figures["linear"]["C"]) % 1 == pytest.approx(0)
    printed = capsys.readouterr().out
    assert "k-NN (k=4)" in printed and f"({correct} of 21)" in printed


def test_a_neighbourhood_of_all_images_and_no_top_5_of_five_classes(folders, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for label in range(5):
            (tmp_path / split / f"{label}").symlink_to(folders / split / f"class{label}")
    (tmp_path / "resnet18.pth").symlink_to(folders / "resnet18.pth")
    assert run_probe(tmp_path, "--json", tmp_path / "p.json", "--k", "999") == 0
    figures = json.loads((tmp_path / "p.json").read_text())
    assert figures["knn"]["k"] == 30 and "top5" not in figures["knn"]


def test_unreadable_images(folders, tmp_path, capsys):
    for split in ("train", "val"):
        for label in range(2):
            save_image(tmp_path / split / f"{label}" / "a.png", label)
    (tmp_path / "resnet18.pth").symlink_to(folders / "resnet18.pth")
    bad = tmp_path / "val" / "1" / "bad.png"
    bad.write_bytes(b"no image")
    assert run_probe(tmp_path) == 1
    printed = capsys.readouterr()
    assert f"{bad}: unreadable" in printed.err and "one image a class" in printed.out
    (tmp_path / "train" / "1" / "a.png").write_bytes(b"no image")
    assert run_probe(tmp_path) == 2
    assert "none of the images used of this class is readable" in capsys.readouterr().err


def test_bad_folders_and_options_are_one_line(folders, tmp_path, capsys):
    for name in ("class0", "class1"):
        save_image(tmp_path / "empty" / name / "a.png", 0)
        save_image(tmp_path / "other" / name.replace("1", "9") / "a.png", 0)
    (tmp_path / "empty" / "class1" / "a.png").unlink()
    (tmp_path / "flat").mkdir()
    for arguments, problem in (
        (["--train", tmp_path / "nowhere"], "--train .*nowhere: no such folder"),
        (["--test", tmp_path / "empty"], r"--test .*: no images in 1 class folders \(class1\)"),
        (["--test", tmp_path / "flat"], "has no class folders"),
        (["--test", tmp_path / "other"], "different class folders: .*class1.* only in --train; class9 only in --test"),
        (["--fraction", "0"], "--fraction 0: must lie in"),
        (["--k", "0"], "--k 0"),
        (["--stage", "0"], "stage=0"),
    ):
        assert run_probe(folders, *arguments) == 2
        error = capsys.readouterr().err
        assert re.search(problem, error) and error.count("\n") == 1, error


def test_missing_scikit_learn_is_one_line(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run_probe(folders) == 2
    assert '".[probe]"' in capsys.readouterr().err
