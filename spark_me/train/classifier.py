"""Classifiers to evaluate: a fine-tuning run's own checkpoints, and published files of any known layout."""

from torch import nn

from spark_me.config_finetune import FinetuneConfig
from spark_me.errors import UserError, shown
from spark_me.inference.model_file import read_model

LISTED = 5


def load_classifier(config: FinetuneConfig, weights: str, classes: list[str], *, raw: bool) -> nn.Module:
    """The network of a configuration with a classifier's weights, in evaluation mode.

    Args:
        config: names the encoder.
        weights: a checkpoint, a published name, a path or URL.
        classes: of the images.
        raw: take a checkpoint's weights themselves, not their moving average.

    Raises:
        UserError: if they are of another encoder or of other classes, or have no classifier.
    """
    file = read_model(weights, raw=raw)
    held, model = file.weights.encoder, config.model
    if (held, file.in_channels) != (model.encoder, model.in_channels):
        raise UserError(
            f"{weights}: is a {held} of {file.in_channels} channels, the configuration's a {model.encoder} of "
            f"{model.in_channels}: use the configuration that it was trained with"
        )
    if file.num_classes is None:
        raise UserError(f"{weights}: has no classifier: fine-tune it first by `spark-me finetune`")
    differing = sorted(set(file.classes or classes) ^ set(classes))
    if file.num_classes != len(classes) or differing:
        names = f" (in one of them alone: {', '.join(map(shown, differing[:LISTED]))})" if differing else ""
        raise UserError(
            f"{weights}: has a classifier of {file.num_classes} classes, the images have {len(classes)}{names}: "
            "give data.root with the same class folders"
        )
    return file.network(classifier=True)
