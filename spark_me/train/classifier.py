"""Classifiers to evaluate: a fine-tuning run's own checkpoints, and published files of any known layout."""

from typing import Any

from torch import nn

from spark_me.config import FinetuneConfig, parse_config
from spark_me.errors import UserError
from spark_me.train.checkpoint import FINETUNE
from spark_me.train.starting_weights import locate
from spark_me.weights.canonical import to_canonical
from spark_me.weights.files import bare_state, read_content
from spark_me.weights.models import build_network
from spark_me.weights.transfer import load_weights


def load_classifier(config: FinetuneConfig, weights: str, classes: list[str], *, raw: bool) -> tuple[nn.Module, str]:
    """The network of a configuration with a classifier's weights, and what these are, in words.

    Raises:
        UserError: if they are of another encoder or of other classes, or have no classifier.
    """
    path = locate(weights, "--weights ")
    content = read_content(path)
    network: nn.Module = build_network(config.model.encoder, len(classes), config.model.in_channels)
    if isinstance(content, dict) and content.get("format") == f"spark_me.{FINETUNE}":
        return network, _load_own(network, config, content, weights, classes, raw)
    state = bare_state(content, weights)
    head = to_canonical(state, weights).tensors.get("fc.weight")
    if head is None:
        raise UserError(f"{weights}: has no classifier: fine-tune it first by `spark-me finetune`")
    if len(head) != len(classes):
        raise UserError(
            f"{weights}: has a classifier of {len(head)} classes, the images have {len(classes)}: "
            "give data.root with the same class folders"
        )
    load_weights(network, state)
    return network, weights


def _load_own(
    network: nn.Module, config: FinetuneConfig, content: dict[str, Any], weights: str, classes: list[str], raw: bool
) -> str:
    trained = parse_config(content["config"], weights, FinetuneConfig)
    if trained.model.encoder != config.model.encoder or trained.model.in_channels != config.model.in_channels:
        raise UserError(
            f"{weights}: is a {trained.model.encoder} of {trained.model.in_channels} channels, the "
            f"configuration's a {config.model.encoder} of {config.model.in_channels}: use the config.yaml of its run"
        )
    if content["classes"] != classes:
        differing = sorted(set(content["classes"]) ^ set(classes))
        raise UserError(
            f"{weights}: was trained on {len(content['classes'])} classes, the images have {len(classes)} (in one of "
            f"them alone: {', '.join(differing[:5])}): give data.root with the same class folders"
        )
    average = content["ema"] is not None and not raw
    network.load_state_dict(content["ema"] if average else content["model"])
    which = "averaged weights" if average else "weights"
    return f"{weights} ({which} after step {content['step']})"
