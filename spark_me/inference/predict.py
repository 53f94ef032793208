"""`spark_me.inference_model`: the class of an image."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spark_me.errors import UserError
from spark_me.inference.classifier import Classifier, load_classifier
from spark_me.inference.view import ImageLike


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
    scores = classifier.scores(classifier.view.see(image)[None])
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
