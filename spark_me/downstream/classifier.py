"""A network with the names of its classes, what a file says of it, and the class of an image by it."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spark_me.config.data import INTERPOLATIONS, LARGEST_AREA, STATISTICS, DataConfig
from spark_me.data.transforms import CentreCrop
from spark_me.dense import build_network
from spark_me.downstream.preprocessing import ImageLike, Preprocessing, crop_preprocessing, recipe_preprocessing
from spark_me.errors import UserError, install_text, shown
from spark_me.weights.canonical import Weights, dense_state, to_canonical
from spark_me.weights.download import is_url, local_file
from spark_me.weights.expected import require_numbers
from spark_me.weights.files import bare_state, read_content, stated_encoder
from spark_me.weights.layouts import RESNET
from spark_me.weights.models import PUBLISHED, list_models

OURS = "spark_me."
"""How the format of the trainer's checkpoints begins. Of each version, what is needed is checked by itself."""


class ModelFile(NamedTuple):
    """A model on the disk."""

    where: str
    """For messages."""
    source: str
    """Path or URL."""
    weights: Weights
    classes: list[str] | None
    """Names of a fine-tuned classifier's classes; None in any other file."""
    preprocessing: Preprocessing
    """How its test images are made."""

    @property
    def in_channels(self) -> int:
        """Channels of its images."""
        return self.weights.in_channels

    @property
    def num_classes(self) -> int | None:
        """Of its classifier; None where it has none."""
        return self.weights.num_classes

    def network(self, *, classifier: bool) -> nn.Module:
        """The dense network in evaluation mode, on the CPU, with its classifier or without.

        Raises:
            UserError: if a library is missing that it needs.
        """
        network = build_network(self.weights.encoder, self.num_classes if classifier else None, self.in_channels)
        network.load_state_dict(dense_state(self.weights, classifier), strict=True)
        return network.eval()


def read_model(source: str | os.PathLike[str], *, raw: bool = False) -> ModelFile:
    """Read weights of any known layout.

    Args:
        source: a name of published weights (downloaded once), or path or URL of a file: any known layout, or a
            checkpoint of pretraining or fine-tuning.
        raw: of a fine-tuning checkpoint, the weights themselves and not their moving average (EMA).

    Raises:
        UserError: for an unknown name, a file that cannot be read, or one that contradicts itself.
        WeightsError: if its tensors are not those of a model.
    """
    where = str(source)
    address = _address(source)
    path = local_file(address)
    content = read_content(path)
    ours = isinstance(content, Mapping) and str(content.get("format", "")).startswith(OURS)
    state = _state(content, ours and not raw, where)
    require_numbers(state, where)
    weights = to_canonical(state, where, likely=stated_encoder(path, content))
    if not ours:
        return ModelFile(where, address, weights, None, _recipe_preprocessing(weights, where))
    preprocessing = _configured_preprocessing(_parse(content.get("config"), where), weights.in_channels, where)
    return ModelFile(where, address, weights, _class_names(content, weights, where), preprocessing)


def _address(source: str | os.PathLike[str]) -> str:
    name = str(source)
    if name in PUBLISHED:
        return PUBLISHED[name].url
    if is_url(name) or os.path.exists(name) or Path(name).suffix or os.sep in name:
        return name  # reading says what is wrong with it
    if name in list_models():
        raise UserError(
            f"{name}: no weights were published by this name: give a file, or one of {', '.join(PUBLISHED)}"
        )
    close = difflib.get_close_matches(name, PUBLISHED, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"give a file or one of {', '.join(PUBLISHED)}"
    raise UserError(f"{name}: neither a file nor the name of published weights: {hint}")


def _state(content: Any, averaged: bool, where: str) -> dict[str, Tensor]:
    if averaged and content.get("ema") is not None:
        content = content["ema"]
    state = bare_state(content, where)
    state.pop("n_averaged", None)  # a counter of torch's own averaging
    return state


def _class_names(content: Mapping[str, Any], weights: Weights, where: str) -> list[str] | None:
    classes, count = content.get("classes"), weights.num_classes
    if classes is None or count is None:
        return None
    if not isinstance(classes, list | tuple):
        raise UserError(f"{where}: holds no list of class names: use an earlier checkpoint")
    if len(classes) != count:
        raise UserError(f"{where}: names {len(classes)} classes, its classifier has {count}: fine-tune again")
    return [str(name) for name in classes]


def _recipe_preprocessing(weights: Weights, where: str) -> Preprocessing:
    try:
        return recipe_preprocessing(weights.in_channels, resnet=RESNET.has(weights.architecture.encoder))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _parse(config: Any, where: str) -> Mapping[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError(f"{where}: its configuration needs PyYAML: {install_text('inference')}") from None
    try:
        parsed = yaml.safe_load(config)
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError):  # no text, a 99th of May, a deep nest
        parsed = None
    if not isinstance(parsed, Mapping) or not all(isinstance(parsed.get(key), Mapping) for key in ("model", "data")):
        raise UserError(f"{where}: holds no configuration that can be read: use an earlier checkpoint")
    return parsed


def _configured_preprocessing(config: Mapping[str, Any], channels: int, where: str) -> Preprocessing:
    """Of fine-tuning: its test crop. Of pretraining: what the loss on held-out images was measured on."""
    model, data = config["model"], config["data"]
    options = {key: data[key] for key in ("interpolation", "mean", "std", "nodata") if data.get(key) is not None}
    settings = DataConfig(**options)
    if not isinstance(settings.interpolation, str) or settings.interpolation not in INTERPOLATIONS:
        raise UserError(
            f"{where}: data.interpolation={shown(settings.interpolation)} is not known: use the spark_me it is from"
        )
    if not _are_numbers([0 if settings.nodata is None else settings.nodata], 1):
        raise UserError(f"{where}: data.nodata={shown(settings.nodata)} is no number: use another checkpoint")
    statistics = [values or STATISTICS.get(channels, ((), ()))[0] for values in (settings.mean, settings.std)]
    if not all(_are_numbers(values, channels) for values in statistics):
        raise UserError(f"{where}: data.mean and data.std are not of its {channels} channels: use another checkpoint")
    resize, crop, size = data.get("test_resize"), data.get("test_crop"), model.get("image_size")
    if _are_sides([resize, crop]):
        return crop_preprocessing(settings, channels, resize, crop)
    if _are_sides(size):
        return Preprocessing(channels, settings, (size[0], size[1]), CentreCrop(size, settings.interpolation))
    raise UserError(
        f"{where}: says neither data.test_crop nor model.image_size, of {LARGEST_AREA} pixels at most: use another "
        "checkpoint"
    )


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(value, int | float) for value in values)


def _are_sides(values: Any) -> bool:
    whole = _are_numbers(values, 2) and all(isinstance(value, int) and value > 0 for value in values)
    return whole and values[0] * values[1] <= LARGEST_AREA


IMAGENET_CLASSES = 1000
NO_CLASSIFIER = "holds an encoder alone: fine-tune it first"


@dataclass(frozen=True)
class Classifier:
    """What a prediction needs.

    Attributes:
        network: images [B, C, H, W] → logits [B, number of classes]; in evaluation mode.
        classes: their names, in the order of the logits.
        preprocessing: how an image is shown to the network.
        long_names: of ImageNet's classes, all names of each in WordNet; None of other classes.
    """

    network: nn.Module
    classes: Sequence[str]
    preprocessing: Preprocessing
    long_names: Sequence[str] | None = None

    @torch.inference_mode()
    def scores(self, images: Tensor) -> Tensor:
        """Soft-max of the logits.

        Args:
            images: [B, C, H, W] as `preprocessing` makes them, on any device.

        Returns:
            float32 [B, number of classes], on the network's device.

        Raises:
            UserError: if there are more or fewer logits than class names.
        """
        device = next((parameter.device for parameter in self.network.parameters()), images.device)
        logits = self.network(images.to(device))
        if logits.ndim != 2 or logits.shape[1] != len(self.classes):
            shape = "×".join(map(str, logits.shape[1:]))
            raise UserError(
                f"the network gives {shape} numbers an image for {len(self.classes)} class names: give class_names"
            )
        return logits.float().softmax(dim=1)


def load_classifier(
    source: str | os.PathLike[str] | nn.Module, class_names: Sequence[str] | None = None, *, raw: bool = False
) -> Classifier:
    """A classifier, ready to predict.

    Its test images are those of its fine-tuning checkpoint, else those of the published recipes: a short edge of 236
    pixels for ResNets and 256 for others, bicubic, the centre of 224, ImageNet's mean and deviation.

    Args:
        source: a published name (see `list_models`; downloaded once), path or URL of a classifier's weights in any
            known layout or of a fine-tuning checkpoint, or a network, which is put into evaluation mode.
        class_names: in the order of the logits; None for those in a fine-tuning checkpoint, and for ImageNet's in
            torchvision's order where there are 1000 classes.
        raw: of a fine-tuning checkpoint, the weights themselves and not their moving average (EMA).

    Raises:
        UserError: if the source is no classifier or cannot be read, or classes have no or too few names.
        WeightsError: if its tensors are not those of a model.
    """
    if isinstance(source, nn.Module):
        return _of_network(source, class_names)
    file = read_model(source, raw=raw)
    if file.num_classes is None:
        raise UserError(f"{file.where}: {NO_CLASSIFIER} (`spark-me finetune`)")
    names = class_names if class_names is not None else file.classes
    if names is None and file.num_classes != IMAGENET_CLASSES:
        raise UserError(
            f"{file.where}: its {file.num_classes} classes have no names: "
            "give a fine-tuning checkpoint of spark_me, or class_names in Python"
        )
    if names is not None and len(names) != file.num_classes:
        raise UserError(f"{file.where}: has {file.num_classes} classes, class_names {len(names)}: give one for each")
    return _named(file.network(classifier=True), names, file.preprocessing)


def imagenet_classes() -> list[str]:
    """The names of ImageNet's 1000 classes, in the usual order."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def imagenet_long_names() -> list[str]:
    """All names of each of ImageNet's 1000 classes in WordNet, in the same order: `tench, Tinca tinca`."""
    return files("spark_me.downstream").joinpath("imagenet_names.txt").read_text(encoding="utf-8").splitlines()


def _named(network: nn.Module, names: Sequence[str] | None, preprocessing: Preprocessing) -> Classifier:
    """A classifier whose classes are ImageNet's where no names are given."""
    if names is not None:
        return Classifier(network, names, preprocessing)
    return Classifier(network, imagenet_classes(), preprocessing, imagenet_long_names())


def _of_network(network: nn.Module, class_names: Sequence[str] | None) -> Classifier:
    # Networks of ours and timm's say how many classes they have; 0 or None are none.
    count = getattr(network, "num_classes", IMAGENET_CLASSES if class_names is None else len(class_names))
    if not count:
        raise UserError(f"the network {NO_CLASSIFIER}")
    if class_names is None and count != IMAGENET_CLASSES:
        raise UserError(f"the network's {count} classes have no names: give class_names")
    from torchvision.models import ResNet

    channels = next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), 3)
    preprocessing = recipe_preprocessing(channels, resnet=isinstance(network, ResNet))
    return _named(network.eval(), class_names, preprocessing)


def inference_model(
    model: Classifier | nn.Module | str | os.PathLike[str],
    image: ImageLike,
    top_k: int | None = None,
    *,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Classify one image.

    Args:
        model: a classifier of `load_classifier`, which is best for many images, or what that takes: a network of
            `get_model` (put into evaluation mode), the name of a published classifier, or the path of a checkpoint.
        image: a path, a file's content (bytes), a PIL image, an array [H, W, 3] of RGB (uint8), or a tensor [3, H, W]
            (uint8, or floats from 0 to 1). It is resized, cropped and normalised as the classifier's test images are;
            files and PIL images are turned upright as their EXIF data says, and transparent pixels shown on white.
        top_k: how many of the likeliest classes to add, all when there are no more.
        class_names: of a model that does not bring them; ImageNet's for one of 1000 classes when None.

    Returns:
        `pred_label` (int), `pred_score` (the soft-max, float) and `pred_class` (its name) of the likeliest class, of
        one of ImageNet's also `pred_class_long` (all its names); `pred_scores`, the soft-max of every class (numpy,
        float32 [number of classes]); with `top_k` also `top_k`, a list of the first of these for so many classes, the
        likeliest first.

    Raises:
        UserError: if the model is no classifier, its classes have no names, or the image cannot be used.
        WeightsError: if a checkpoint's tensors are not those of a model.
    """
    check_top_k(top_k)
    classifier = model if isinstance(model, Classifier) else load_classifier(model, class_names)
    scores = classifier.scores(classifier.preprocessing.prepare(image)[None])
    return as_prediction(scores[0], classifier, top_k) | {"pred_scores": scores[0].cpu().numpy()}


def as_prediction(scores: Tensor, classifier: Classifier, top_k: int | None) -> dict[str, Any]:
    """What `inference_model` returns but for all the scores, from the soft-max of one image."""
    best, labels = torch.topk(scores, min(top_k or 1, len(scores)))
    ranked = []
    for score, label in zip(best.tolist(), labels.tolist()):
        ranked.append({"pred_label": label, "pred_score": score, "pred_class": classifier.classes[label]})
        if classifier.long_names is not None:
            ranked[-1]["pred_class_long"] = classifier.long_names[label]
    return dict(ranked[0]) if top_k is None else {**ranked[0], "top_k": ranked}


def check_top_k(top_k: int | None) -> None:
    """Refuse to list less than one class.

    Raises:
        UserError: if so.
    """
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: must be at least 1")
