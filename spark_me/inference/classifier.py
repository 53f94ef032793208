"""A network with the names of its classes and the images that it is tested on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor, nn

from spark_me.errors import UserError
from spark_me.inference.model_file import read_model
from spark_me.inference.view import View, recipe_view

IMAGENET_CLASSES = 1000
NO_CLASSIFIER = "holds an encoder alone: fine-tune it first"


@dataclass(frozen=True)
class Classifier:
    """What a prediction needs.

    Attributes:
        network: images [B, C, H, W] → logits [B, number of classes]; in evaluation mode.
        classes: their names, in the order of the logits.
        view: how an image is shown to the network.
        long_names: of ImageNet's classes, all names of each in WordNet; None of other classes.
    """

    network: nn.Module
    classes: Sequence[str]
    view: View
    long_names: Sequence[str] | None = None

    @torch.inference_mode()
    def scores(self, images: Tensor) -> Tensor:
        """Soft-max of the logits.

        Args:
            images: [B, C, H, W] as `view` makes them, on any device.

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
    return _named(file.network(classifier=True), names, file.view)


def imagenet_classes() -> list[str]:
    """The names of ImageNet's 1000 classes, in the usual order."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def imagenet_long_names() -> list[str]:
    """All names of each of ImageNet's 1000 classes in WordNet, in the same order: `tench, Tinca tinca`."""
    return files("spark_me.inference").joinpath("imagenet_names.txt").read_text(encoding="utf-8").splitlines()


def _named(network: nn.Module, names: Sequence[str] | None, view: View) -> Classifier:
    """A classifier whose classes are ImageNet's where no names are given."""
    if names is not None:
        return Classifier(network, names, view)
    return Classifier(network, imagenet_classes(), view, imagenet_long_names())


def _of_network(network: nn.Module, class_names: Sequence[str] | None) -> Classifier:
    # Networks of ours and timm's say how many classes they have; 0 or None are none.
    count = getattr(network, "num_classes", IMAGENET_CLASSES if class_names is None else len(class_names))
    if not count:
        raise UserError(f"the network {NO_CLASSIFIER}")
    if class_names is None and count != IMAGENET_CLASSES:
        raise UserError(f"the network's {count} classes have no names: give class_names")
    from torchvision.models import ResNet

    channels = next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), 3)
    view = recipe_view(channels, resnet=isinstance(network, ResNet))
    return _named(network.eval(), class_names, view)
