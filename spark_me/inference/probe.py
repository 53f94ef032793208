"""`spark-me probe`: how far frozen features tell classes apart."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spark_me.errors import UserError
from spark_me.files import check_output, write_json
from spark_me.inference.batches import report
from spark_me.inference.features import DEEPEST, Encoder, extract_features, load_encoder
from spark_me.inference.labelled import Labelled, balanced_part, find_labelled, require_equal_classes
from spark_me.inference.probe_classifiers import linear_probe, nearest_neighbours, require_sklearn


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
    stage: int = DEEPEST,
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
    train_images, test_images = find_labelled(train, "--train"), find_labelled(test, "--test")
    require_equal_classes(train_images, test_images)
    part = balanced_part(train_images.labels, fraction, seed)
    train_images = Labelled(train_images.paths.select(part), train_images.labels[part], train_images.classes)
    encoder = load_encoder(source, stage, raw=raw)
    train_features = _features(encoder, train_images, "training images", options)
    test_features = _features(encoder, test_images, "test images", options)
    _require_all_classes(train_features, train_images, train)
    figures = {
        "encoder": encoder.name,
        "stage": stage,
        "features": train_features.rows.shape[1],
        "classes": len(train_images.classes),
        "fraction": fraction,
        "seed": seed,
        "train_images": len(train_features.rows),
        "test_images": len(test_features.rows),
        **_measure(train_features, test_features, len(train_images.classes), k, seed),
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
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{figures['encoder']}, stage {figures['stage']}: {figures['features']} features; "
        f"{figures['classes']} classes, {figures['train_images']} training and {total} test images"
    ]
    for name, row in rows:
        tops = (
            f"top-{top} {row[f'top{top}']:6.2%} ({row[f'top{top}_correct']} of {total})"
            for top in _tops(figures["classes"])
        )
        lines.append(f"{name:{width}}  {'  '.join(tops)}")
    return "\n".join(lines)


def _check(fraction: float, seed: int, k: int, json_file: Path | None) -> None:
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g}: must lie in (0, 1]")
    if k < 1 or seed < 0:
        raise UserError(f"--k {k} and --seed {seed}: must be at least 1 and 0")
    require_sklearn()  # before features are computed for hours
    check_output(json_file)


def _features(encoder: Encoder, images: Labelled, what: str, options: dict[str, Any]) -> Features:
    results = extract_features(encoder, images.paths, what=what, **options)
    return Features(results.rows, torch.from_numpy(images.labels[results.places]), results.unreadable)


def _require_all_classes(features: Features, images: Labelled, root: Path) -> None:
    missing = np.setdiff1d(np.arange(len(images.classes)), features.labels.numpy())
    if len(missing):
        folder = root / images.classes[missing[0]]
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
