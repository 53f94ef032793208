"""`spark-me evaluate`: the accuracy of a classifier on the validation images of a configuration."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from spark_me.config.tasks import FinetuneConfig, FinetuneModelConfig
from spark_me.data.class_folders import find_val
from spark_me.data.datasets import Batch
from spark_me.data.loaders import held_out_loader, labelled_test_dataset
from spark_me.downstream.classifier import read_model
from spark_me.errors import UserError, listed, printable, shown
from spark_me.files import check_output, check_output_folder, write_json, writing
from spark_me.tables import text_table
from spark_me.train.distributed import Precision, device_of_process
from spark_me.train.plots import save_figure
from spark_me.train.starting_weights import settle_images


class Predictions(NamedTuple):
    """What a network makes of N images."""

    labels: Tensor
    """int64 [N], the true classes."""
    predicted: Tensor
    """int64 [N], the classes of the highest logits."""
    in_top5: Tensor
    """bool [N], whether the true class is among the five highest logits."""
    losses: Tensor
    """float64 [N], cross-entropy with the true class."""

    @property
    def sums(self) -> tuple[float, float, float, float]:
        """Number of images, sum of their losses, and how many are right by top-1 and by top-5."""
        right, among = int((self.predicted == self.labels).sum()), int(self.in_top5.sum())
        return len(self.labels), self.losses.sum().item(), right, among


@torch.no_grad()
def predict_all(
    networks: Mapping[str, nn.Module], batches: Iterable[Batch], device: torch.device, autocast: torch.autocast
) -> tuple[dict[str, Predictions], list[tuple[str, str]]]:
    """Predict the classes of images by each network, in evaluation mode; they are left in the mode they were in.

    Returns:
        Predictions by the networks' names, and (path, reason) of images that were unreadable.
    """
    modes = {name: network.training for name, network in networks.items()}
    parts: dict[str, list[Predictions]] = {name: [] for name in networks}
    unreadable: list[tuple[str, str]] = []
    for network in networks.values():
        network.eval()
    for batch in batches:
        unreadable += batch.unreadable
        if batch.labels is None:
            continue
        images = batch.images.to(device)
        for name, network in networks.items():
            with autocast:
                logits = network(images)
            parts[name].append(_judge(logits.float().cpu(), batch.labels))
    for name, network in networks.items():
        network.train(modes[name])
    return {name: _joined(own) for name, own in parts.items()}, unreadable


def _judge(logits: Tensor, labels: Tensor) -> Predictions:
    highest = logits.topk(min(5, logits.shape[1])).indices
    losses = functional.cross_entropy(logits.double(), labels, reduction="none")
    return Predictions(labels, highest[:, 0], (highest == labels[:, None]).any(dim=1), losses)


def _joined(parts: list[Predictions]) -> Predictions:
    if not parts:
        empty = torch.empty(0, dtype=torch.int64)
        return Predictions(empty, empty, empty.bool(), empty.double())
    return Predictions(*(torch.cat(tensors) for tensors in zip(*parts)))


NAMED = 40
"""Most classes whose names are written on the axes."""
LONGEST_NAME = 24
"""Characters of a name there."""
NUMBERED = 15
"""Most classes whose counts are written in the squares."""


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix; colours are shares of the true class.

    Args:
        confusion: [true class][predicted class], images.
        classes: their names.
        path: PNG to write.
    """
    counts = np.asarray(confusion)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = min(12.0, max(4.5, 0.35 * len(classes) + 2))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class", title="Share of the true class")
    figure.colorbar(image, ax=axes, shrink=0.8)
    if len(classes) <= NAMED:
        names = [shown(name, LONGEST_NAME) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(classes)), names, parse_math=False)
    if len(classes) <= NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    save_figure(figure, path)


def load_classifier(model: FinetuneModelConfig, weights: str, classes: list[str], *, raw: bool) -> nn.Module:
    """The network of a configuration with a classifier's weights, in evaluation mode.

    Args:
        model: names the encoder.
        weights: a checkpoint, a published name, a path or URL.
        classes: of the images.
        raw: take a checkpoint's weights themselves, not their moving average.

    Raises:
        UserError: if they are of another encoder or of other classes, or have no classifier.
    """
    file = read_model(weights, raw=raw)
    held = file.weights.encoder
    if (held, file.in_channels) != (model.encoder, model.in_channels):
        raise UserError(
            f"{weights}: is a {held} of {file.in_channels} channels, the configuration's a {model.encoder} of "
            f"{model.in_channels}: use the configuration that it was trained with"
        )
    if file.num_classes is None:
        raise UserError(f"{weights}: has no classifier: fine-tune it first by `spark-me finetune`")
    differing = [shown(name) for name in sorted(set(file.classes or classes) ^ set(classes))]
    if file.num_classes != len(classes) or differing:
        names = f" (in one of them alone: {listed(differing)})" if differing else ""
        raise UserError(
            f"{weights}: has a classifier of {file.num_classes} classes, the images have {len(classes)}{names}: "
            "give data.root with the same class folders"
        )
    return file.network(classifier=True)


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
    config: FinetuneConfig, *, raw: bool = False, json_file: Path | None = None, out: Path | None = None
) -> Evaluation:
    """Measure a classifier under the test crop of a configuration, and print the result.

    Args:
        config: names the encoder, its weights (a fine-tuning checkpoint, or a published name, path or URL of any known
            layout with a classifier) and the validation images; what it leaves open of them is filled in
            (`settle_images`).
        raw: take a checkpoint's weights themselves, not their moving average.
        json_file: where all figures are written.
        out: folder for confusion.png.

    Raises:
        UserError: if the weights do not fit encoder or classes, or images are missing or unreadable.
    """
    weights = config.weights
    check_output(json_file, weights)
    if out is not None:
        check_output_folder(out)
    data, channels = config.data, config.model.in_channels
    settle_images(data, channels, weights, "weights=")
    images, classes = find_val(data)
    network = load_classifier(config.model, weights, classes, raw=raw)
    device = device_of_process(config.run.device)
    precision = Precision(config.train.precision, device)
    dataset = labelled_test_dataset(images, data, channels, config.run.seed)
    size = max(1, config.train.batch_size // config.train.accumulate)
    batches = held_out_loader(dataset, size, data.workers, pin_memory=device.type == "cuda")
    watched = tqdm(batches, desc="evaluating", unit="batch", disable=None)
    with precision.products():
        own, unreadable = predict_all({"": network.to(device)}, watched, device, precision.autocast)
    _require_most(unreadable, len(images.paths), data.max_unreadable)
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
    rows = [
        (shown(row["class"]), str(row["images"]), "-" if row["top1"] is None else f"{row['top1']:.1%}")
        for row in result.classes
    ]
    print(text_table([("class", "images", "top-1"), *rows], "<>>"))
