"""The table of docs/recipes.md that holds every published recipe against its source is what the YAML files say."""

from functools import cache
from pathlib import Path

import torch
from test_recipes import IMAGENET, PRETRAIN, RECIPES
from test_recipes_finetune import FINETUNE
from test_recipes_finetune import RECIPES as FINETUNE_RECIPES
from torch import nn

from spark_me import build_model
from spark_me.config.loading import load_config
from spark_me.config.tasks import AnyConfig, FinetuneConfig
from spark_me.downstream.layer_decay import LayerDecay
from spark_me.train.schedules import build_schedule, count_steps_per_epoch, full_rate, parameter_groups
from spark_me.weights.models import build_network

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
HEADER = [
    "recipe", "initial weights", "parameter groups", "clipping", "LAMB", "steps an epoch", "steps",
    "lr first, peak, last", "decay first, last",
]  # fmt: skip


@cache
def pretrained(encoder: str, decoder_width: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(encoder, image_size=64, decoder_width=decoder_width)


@cache
def tuned_network(encoder: str) -> nn.Module:
    with torch.device("meta"):
        return build_network(encoder, 1000)


def rows() -> list[list[str]]:
    """What the configurations say, in the table's words."""
    table = [HEADER, ["---"] * len(HEADER)]
    for name in RECIPES:
        config = load_config(PRETRAIN / f"{name}.yaml", ["data.root=imagenet"])
        model = config.model
        groups = parameter_groups(pretrained(model.encoder, model.decoder_width), full_rate)
        table.append(row(name, config, config.model.init, len(groups)))
    for name in FINETUNE_RECIPES:
        tuned = load_config(FINETUNE / f"{name}.yaml", ["weights=none", "data.root=imagenet"], schema=FinetuneConfig)
        network = tuned_network(tuned.model.encoder)
        groups = parameter_groups(network, LayerDecay(network, tuned.optim.layer_decay).scale)
        std = tuned.model.classifier_std
        classifier = "classifier by the library" if std is None else f"classifier normal, {std:g}"
        table.append(row(name, tuned, classifier, len(groups)))
    return table


def row(name: str, config: AnyConfig, initial: str, groups: int) -> list[str]:
    optim = config.optim
    each = count_steps_per_epoch(IMAGENET, config.data, config.train.batch_size)
    schedule = build_schedule(config.optim, config.train, each)
    lamb = optim.lamb
    inner = [] if lamb.max_grad_norm is None else [f"clips at {lamb.max_grad_norm:g}"]
    if not lamb.bias_correction:
        inner.append("uncorrected averages")
    if lamb.always_adapt:
        inner.append("adapts all")
    last = schedule.steps - 1
    return [
        name,
        initial,
        str(groups),
        "none" if optim.clip_norm is None else f"{optim.clip_norm:g}",
        (", ".join(inner) or "plain") if optim.name == "lamb" else "(AdamW)",
        str(each),
        f"{schedule.steps:,}",
        ", ".join(f"{schedule.lr(step):.3g}" for step in (0, schedule.warmup_steps, last)),
        ", ".join(f"{schedule.decay(step):g}" for step in (0, last)),
    ]


def test_the_page_says_what_the_recipes_do() -> None:
    lines = PAGE.read_text().splitlines()
    expected = [f"| {' | '.join(cells)} |" for cells in rows()]
    start = lines.index(expected[0])
    assert lines[start : start + len(expected)] == expected


if __name__ == "__main__":
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows()))
