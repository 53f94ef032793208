"""`spark-me probe`: how far frozen features tell classes apart."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spark_me.data.class_folders import Labelled, balanced_part, balanced_places, find_classes
from spark_me.downstream.features import Encoder, extract_features, load_encoder
from spark_me.downstream.images import report
from spark_me.errors import UserError, install_text, listed, shown
from spark_me.files import check_output, write_json
from spark_me.tables import text_table


def require_equal_classes(train: Sequence[str], test: Sequence[str]) -> None:
    """Refuse training and test images of different classes.

    Raises:
        UserError: naming those that only one of them has.
    """
    problems = [
        f"{listed([shown(name) for name in names])} only in {where}"
        for where, names in (
            ("--train", sorted(set(train) - set(test))),
            ("--test", sorted(set(test) - set(train))),
        )
        if names
    ]
    if problems:
        raise UserError(f"--train and --test have different class folders: {'; '.join(problems)}: make them the same")


TEMPERATURE = 0.07
"""Of the neighbours' weights (arXiv 1805.01978, section 3.4)."""
STRENGTHS = tuple(10.0**power for power in range(-4, 4))
"""Inverse strengths C of the regularisation that are tried, the strongest first."""
HELD_OUT = 0.2
"""Share of each class that the strength is chosen on."""
CHUNK = 1024
"""Test images whose similarities are held at once."""


class Linear(NamedTuple):
    """A linear probe's result."""

    scores: Tensor
    """float64 [n, number of classes]: probabilities."""
    strength: float
    """The inverse strength C."""
    chosen: bool
    """Whether C was chosen on held-out images; else it is 1, because each class has a single one."""


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int) -> Tensor:
    """Votes of the k training images of largest cosine similarity s, each with the weight exp(s / 0.07).

    Args:
        train: features [m, C].
        labels: int64 [m].
        test: features [n, C].
        classes: how many there are.
        k: at most m.

    Returns:
        float32 [n, classes], each row's votes as shares.
    """
    train, test = functional.normalize(train), functional.normalize(test)
    votes = []
    for chunk in test.split(CHUNK):
        similarity, neighbours = (chunk @ train.T).topk(k, dim=1)
        weights = (similarity / TEMPERATURE).softmax(dim=1)
        votes.append(torch.zeros(len(chunk), classes).scatter_add_(1, labels[neighbours], weights))
    return torch.cat(votes)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Linear:
    """Multinomial logistic regression on standardised features.

    C is the one that classifies most of a held-out fifth of the training images, the smallest of equals; the regression
    is then fitted to all of them.

    Args:
        train: features [m, C].
        labels: int64 [m], every class among them.
        test: features [n, C].
        seed: decides what is held out.
    """
    inputs, targets = train.double().numpy(), labels.numpy()
    strength = _choose_strength(inputs, targets, seed)
    model = _regression(strength or 1.0).fit(inputs, targets)
    scores = torch.from_numpy(model.predict_proba(test.double().numpy()))
    return Linear(scores, strength or 1.0, strength is not None)


def _choose_strength(inputs: np.ndarray, targets: np.ndarray, seed: int) -> float | None:
    """The best C; None if no class can spare an image."""
    spare = np.flatnonzero(np.bincount(targets)[targets] > 1)
    if not len(spare):
        return None
    held_out = spare[balanced_places(targets[spare].tolist(), HELD_OUT, seed)]
    kept = np.setdiff1d(np.arange(len(targets)), held_out)
    correct = {
        strength: _regression(strength).fit(inputs[kept], targets[kept]).score(inputs[held_out], targets[held_out])
        for strength in STRENGTHS
    }
    return max(correct, key=lambda strength: correct[strength])


def require_sklearn() -> None:
    """Refuse to begin without scikit-learn.

    Raises:
        UserError: if it is missing.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(f"the linear probe needs scikit-learn: {install_text('probe')}")


def _regression(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


class Features(NamedTuple):
    """Of the readable images of one split."""

    rows: Tensor
    """float32 [n, C]."""
    labels: Tensor
    """int64 [n]."""
    unreadable: list[tuple[Path, str]]


def probe(
    source: str,
    train: Path,
    test: Path,
    *,
    fraction: float = 1.0,
    seed: int = 0,
    k: int = 20,
    stage: int | None = None,
    raw: bool = False,
    json_file: Path | None = None,
    **options: Any,
) -> int:
    """Classify test images by the frozen features of training images: nearest neighbours, and a linear probe.

    Args:
        source, stage, raw: see `load_encoder`.
        train, test: folders with one folder a class.
        fraction: share of each class's training images that is used, at least one of each.
        seed: decides which, and what the linear probe holds out.
        k: neighbours that vote; all training images where there are fewer.
        json_file: gets the figures.
        options: of `extract_features`.

    Returns:
        The exit code: 1 if any image is unreadable, else 0.

    Raises:
        UserError: if the source or a folder cannot be used, the classes differ, or scikit-learn is missing.
    """
    _check(fraction, seed, k, json_file)
    all_images, classes = find_classes(train, f"--train {train}")
    test_images, test_classes = find_classes(test, f"--test {test}")
    require_equal_classes(classes, test_classes)
    train_images = balanced_part(all_images, fraction, seed)
    encoder = load_encoder(source, stage, raw=raw)
    train_features = _features(encoder, train_images, "training images", options)
    test_features = _features(encoder, test_images, "test images", options)
    _require_all_classes(train_features, classes, train)
    figures = {
        "encoder": encoder.name,
        "stage": encoder.stage,
        "features": train_features.rows.shape[1],
        "classes": len(classes),
        "fraction": fraction,
        "seed": seed,
        "train_images": len(train_features.rows),
        "test_images": len(test_features.rows),
        **_measure(train_features, test_features, len(classes), k, seed),
    }
    if json_file is not None:
        write_json(json_file, figures)
    print(summary(figures))
    return report(train_features.unreadable + test_features.unreadable)


def count_correct(scores: Tensor, labels: Tensor, top: int) -> int:
    """How many rows have their label among the `top` largest scores; of equal scores, the first classes count.

    Args:
        scores: [n, number of classes].
        labels: int64 [n].
        top: how many.
    """
    ranked = scores.argsort(dim=1, descending=True, stable=True)[:, :top]
    return int((ranked == labels[:, None]).any(dim=1).sum())


def summary(figures: dict[str, Any]) -> str:
    """The figures for people."""
    total, knn, linear = figures["test_images"], figures["knn"], figures["linear"]
    chosen = "" if linear["chosen"] else ", not chosen: one image a class"
    rows = ((f"k-NN (k={knn['k']})", knn), (f"linear (C={linear['C']:g}{chosen})", linear))
    tops = _tops(figures["classes"])
    cells = [
        (name, *(f"top-{top} {row[f'top{top}']:6.2%} ({row[f'top{top}_correct']} of {total})" for top in tops))
        for name, row in rows
    ]
    return (
        f"{figures['encoder']}, stage {figures['stage']}: {figures['features']} features; "
        f"{figures['classes']} classes, {figures['train_images']} training and {total} test images\n"
        + text_table(cells, "<<<")
    )


def _check(fraction: float, seed: int, k: int, json_file: Path | None) -> None:
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g}: must lie in (0, 1]")
    if k < 1 or seed < 0:
        raise UserError(f"--k {k} and --seed {seed}: must be at least 1 and 0")
    require_sklearn()  # before features are computed for hours
    check_output(json_file)


def _features(encoder: Encoder, images: Labelled, what: str, options: dict[str, Any]) -> Features:
    results = extract_features(encoder, images.paths, what=what, **options)
    return Features(results.rows, torch.tensor(images.labels)[results.places], results.unreadable)


def _require_all_classes(features: Features, classes: Sequence[str], root: Path) -> None:
    missing = np.setdiff1d(np.arange(len(classes)), features.labels.numpy())
    if len(missing):
        folder = root / classes[missing[0]]
        raise UserError(f"--train {folder}: none of the images used of this class is readable: repair or remove them")


def _measure(train: Features, test: Features, classes: int, k: int, seed: int) -> dict[str, Any]:
    k = min(k, len(train.rows))
    linear = linear_probe(train.rows, train.labels, test.rows, seed)
    votes = nearest_neighbours(train.rows, train.labels, test.rows, classes, k)
    return {
        "knn": {"k": k, **_accuracy(votes, test.labels, classes)},
        "linear": {"C": linear.strength, "chosen": linear.chosen, **_accuracy(linear.scores, test.labels, classes)},
    }


def _accuracy(scores: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for top in _tops(classes):
        correct = count_correct(scores, labels, top)
        figures |= {f"top{top}": correct / len(labels), f"top{top}_correct": correct}
    return figures


def _tops(classes: int) -> tuple[int, ...]:
    """With five classes or fewer, all are among the first five."""
    return (1, 5) if classes > 5 else (1,)
