"""`spark-me evaluate`: the accuracy of a classifier on the validation images of a configuration."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from spark_me.config_finetune import FinetuneConfig
from spark_me.data.class_folders import find_val
from spark_me.data.labelled import held_out_labelled
from spark_me.data.loaders import held_out_loader
from spark_me.errors import UserError, printable, shown
from spark_me.files import check_output, check_output_folder, write_json, writing
from spark_me.train.accuracy import Predictions, predict_all
from spark_me.train.classifier import load_classifier
from spark_me.train.confusion import plot_confusion
from spark_me.train.precision import Precision, pick_device
from spark_me.train.starting_weights import settle_images

ON_SCREEN = 40
"""Most classes whose table is printed."""


class Evaluation(NamedTuple):
    """What was measured; shares of 1."""

    weights: str
    """As they were named."""
    images: int
    loss: float
    """Mean cross-entropy."""
    top1: float
    top5: float
    """1 with five classes or fewer."""
    classes: list[dict[str, Any]]
    """Of each class its name, number of images and top-1; None without images."""
    confusion: list[list[int]]
    """[true class][predicted class]: images."""
    unreadable: list[tuple[str, str]]
    """(path, reason) of images that were left out."""


def evaluate(
    config: FinetuneConfig, weights: str, *, raw: bool = False, json_file: Path | None = None, out: Path | None = None
) -> Evaluation:
    """Measure a classifier under the test crop of a configuration, and print the result.

    Args:
        config: names the encoder and the validation images; what it leaves open of them is filled in
            (`settle_images`).
        weights: a fine-tuning checkpoint, or a published name, path or URL of any known layout with a classifier.
        raw: take a checkpoint's weights themselves, not their moving average.
        json_file: where all figures are written.
        out: folder for confusion.png.

    Raises:
        UserError: if the weights do not fit encoder or classes, or images are missing or unreadable.
    """
    check_output(json_file, weights)
    if out is not None:
        check_output_folder(out)
    settle_images(config, weights, "--weights ")
    images, classes = find_val(config.data)
    network = load_classifier(config, weights, classes, raw=raw)
    device = pick_device(config.run.device)
    precision = Precision(config.train.precision, device)
    batches = held_out_loader(held_out_labelled(images, config), config, pin_memory=device.type == "cuda")
    watched = tqdm(batches, desc="evaluating", unit="batch", disable=None)
    with precision.products():
        own, unreadable = predict_all({"": network.to(device)}, watched, device, precision.autocast)
    _require_most(unreadable, len(images.paths), config.data.max_unreadable)
    result = _summary(f"{weights} (raw weights)" if raw else weights, classes, own[""], unreadable)
    _print(result)
    if json_file is not None:
        write_json(json_file, result._asdict())
        print(f"figures   {printable(str(json_file))}")
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        plot_confusion(result.confusion, classes, out / "confusion.png")
        print(f"look at   {printable(str(out / 'confusion.png'))}")
    return result


def confusion_of(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 [K, K]: how many images of each true class (row) are taken for each class (column)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def _summary(
    weights: str, classes: list[str], predictions: Predictions, unreadable: list[tuple[str, str]]
) -> Evaluation:
    images, loss, top1, top5 = predictions.sums
    confusion = confusion_of(predictions.labels, predictions.predicted, len(classes))
    counts, right = confusion.sum(dim=1).tolist(), confusion.diag().tolist()
    table = [
        {"class": name, "images": count, "top1": hits / count if count else None}
        for name, count, hits in zip(classes, counts, right)
    ]
    shares = (loss / images, top1 / images, top5 / images)
    return Evaluation(weights, int(images), *shares, table, confusion.tolist(), unreadable)


def _require_most(unreadable: list[tuple[str, str]], images: int, share: float) -> None:
    if len(unreadable) > share * images or len(unreadable) == images:
        path, reason = unreadable[0]
        raise UserError(
            f"{path}: unreadable ({reason}), as {len(unreadable)} of {images} validation images are: repair or remove "
            f"them, or raise data.max_unreadable={share}"
        )


def _print(result: Evaluation) -> None:
    print(f"{printable(result.weights)}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f}")
    skipped = f", {len(result.unreadable)} unreadable ones left out" if result.unreadable else ""
    print(f"on {result.images} images of {len(result.classes)} classes{skipped}")
    if len(result.classes) > ON_SCREEN:
        return
    names = [shown(row["class"]) for row in result.classes]
    width = max(map(len, ["class", *names]))
    print(f"{'class':<{width}}  images   top-1")
    for name, row in zip(names, result.classes):
        accuracy = "-" if row["top1"] is None else f"{row['top1']:.1%}"
        print(f"{name:<{width}}  {row['images']:>6}  {accuracy:>6}")
