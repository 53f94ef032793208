"""Every fine-tuning recipe: its numbers are the published ones, and its network takes a step."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_recipes import IMAGENET, STEPS_OF_EPOCH
from tiny_finetune import write_classes
from tiny_runs import take_step
from torch import nn

from spark_me.config.loading import load_config
from spark_me.config.tasks import FinetuneConfig
from spark_me.data.class_folders import find_labelled
from spark_me.data.sampler import Share
from spark_me.downstream.finetune import Finetuning
from spark_me.downstream.layer_decay import LayerDecay
from spark_me.train.checkpoint import TrainState
from spark_me.train.distributed import Precision
from spark_me.train.schedules import build_optimizer, build_schedule, count_steps_per_epoch
from spark_me.train.step import Stepper
from spark_me.weights.models import build_network

FINETUNE = Path(__file__).parents[1] / "configs" / "finetune"
CPU = torch.device("cpu")


class Recipe(NamedTuple):
    """A recipe as published. Learning rates are at its total batch."""

    encoder: str
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    layer_decay: float
    epochs: int
    warmup_epochs: int
    first_lr: float
    last_lr: float
    loss: str
    mixup: float
    copies: int
    ema: float | None
    drop_path: float
    test_resize: int
    stem_scale: float
    """The stem's share of the learning rate: the decay to the power of the groups behind it."""
    lamb: dict[str, float | bool] | None = None
    """Options of LAMB, where that is the optimizer."""
    classifier_std: float | None = None
    """Of its initial weights, in mmpretrain's normal distribution; None for that of torchvision or timm."""


OFFICIAL_LAMB = {"max_grad_norm": 1e7, "bias_correction": False, "always_adapt": True}
MMPRETRAIN_LAMB = {"max_grad_norm": 1.0, "bias_correction": True, "always_adapt": False}
# fmt: off
RECIPES = {
    "resnet50_8xb256-coslr-300e_in1k": Recipe(
        "resnet50", 2048, "lamb", 0.016, 0.02, 0.7, 300, 5, 1.6e-6, 1e-6, "bce", 0.1, 1, None, 0.05, 236, 0.0823543,
        MMPRETRAIN_LAMB, 0.01),
    "convnextv2-tiny_8xb256-coslr-300e_in1k": Recipe(
        "convnextv2_tiny", 2048, "adamw", 3.2e-3, 0.05, 0.7, 300, 20, 3.2e-7, 1e-5, "ce", 0.8, 3, 0.9999, 0.1, 256,
        0.0823543),
    "resnet50_official-300e_in1k": Recipe(
        "resnet50", 2048, "lamb", 0.016, 0.02, 0.7, 300, 5, 8e-5, 1.6e-5, "bce", 0.1, 1, 0.9999, 0.05, 236, 0.0823543,
        OFFICIAL_LAMB),
    "resnet101_official-300e_in1k": Recipe(
        "resnet101", 2048, "lamb", 0.008, 0.02, 0.8, 300, 5, 4e-5, 8e-6, "bce", 0.1, 1, 0.9999, 0.2, 236, 0.0549756,
        OFFICIAL_LAMB),
    "resnet152_official-300e_in1k": Recipe(
        "resnet152", 2048, "lamb", 0.008, 0.02, 0.8, 300, 5, 4e-5, 8e-6, "bce", 0.1, 1, 0.9999, 0.2, 236, 0.0439805,
        OFFICIAL_LAMB),
    "resnet200_official-300e_in1k": Recipe(
        "resnet200", 2048, "lamb", 0.008, 0.02, 0.8, 300, 5, 4e-5, 8e-6, "bce", 0.1, 1, 0.9999, 0.2, 236, 0.0180144,
        OFFICIAL_LAMB),
    "convnext-small_official-400e_in1k": Recipe(
        "convnext_small", 4096, "adamw", 3.2e-3, 0.01, 0.7, 400, 20, 1.6e-5, 3.2e-6, "ce", 0.8, 3, 0.9999, 0.3, 236,
        0.00968890),
    "convnext-base_official-400e_in1k": Recipe(
        "convnext_base", 4096, "adamw", 1.6e-3, 0.01, 0.7, 400, 20, 8e-6, 1.6e-6, "ce", 0.8, 3, 0.9999, 0.4, 236,
        0.00968890),
    "convnext-large_official-200e_in1k": Recipe(
        "convnext_large", 4096, "adamw", 1.6e-3, 0.02, 0.7, 200, 10, 8e-6, 1.6e-6, "ce", 0.8, 3, 0.9999, 0.5, 236,
        0.00968890),
}
# fmt: on


def load(name: str, *overrides: str) -> FinetuneConfig:
    return load_config(FINETUNE / f"{name}.yaml", ["weights=none", *overrides], schema=FinetuneConfig)


def test_every_recipe_is_in_the_table() -> None:
    names = {path.stem for path in FINETUNE.glob("*.yaml") if not path.stem.startswith("base")}
    assert names == {*RECIPES, "small"}


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_and_curves_are_the_published_ones(name: str) -> None:
    recipe, config = RECIPES[name], load(name, "data.root=imagenet")
    model, data, train = config.model, config.data, config.train
    assert (model.encoder, model.drop_path) == (recipe.encoder, recipe.drop_path)
    assert (data.train_crop, data.crop_scale, data.flip, data.interpolation) == (224, [0.08, 1.0], 0.5, "bicubic")
    assert (data.trivial_augment, data.erasing, data.repeated_augmentation) == (True, 0.25, recipe.copies)
    assert (data.test_resize, data.test_crop, data.fraction) == (recipe.test_resize, 224, 1.0)
    assert [255 * value for value in data.mean or []] == pytest.approx([123.675, 116.28, 103.53])
    assert [255 * value for value in data.std or []] == pytest.approx([58.395, 57.12, 57.375])
    assert (config.optim.name, config.optim.betas, config.optim.clip_norm) == (recipe.optimizer, [0.9, 0.999], None)
    assert config.optim.layer_decay == recipe.layer_decay
    assert (train.loss, train.label_smoothing, train.mixup, train.cutmix) == (recipe.loss, 0.1, recipe.mixup, 1.0)
    assert (train.ema, train.batch_size, train.epochs) == (recipe.ema, recipe.batch_size, recipe.epochs)
    assert recipe.lamb is None or asdict(config.optim.lamb) == recipe.lamb
    assert model.classifier_std == recipe.classifier_std
    each = STEPS_OF_EPOCH[recipe.batch_size]
    assert count_steps_per_epoch(IMAGENET, config.data, config.train.batch_size) == each
    schedule = build_schedule(config.optim, config.train, each)
    last = recipe.epochs * each - 1
    assert schedule.lr(0) == pytest.approx(recipe.first_lr)
    assert schedule.lr(recipe.warmup_epochs * each) == pytest.approx(recipe.lr)
    assert schedule.lr(last) == pytest.approx(recipe.last_lr)
    half_way = recipe.warmup_epochs * each + (last - recipe.warmup_epochs * each) / 2
    assert schedule.lr(round(half_way)) == pytest.approx((recipe.lr + recipe.last_lr) / 2, rel=1e-3)
    assert {schedule.decay(step) for step in (0, last // 2, last)} == {recipe.weight_decay}


@pytest.mark.parametrize("name", [*RECIPES, "small"])
def test_groups_learn_at_the_published_shares_of_the_rate(name: str) -> None:
    config = load(name, "data.root=imagenet")
    with torch.device("meta"):
        network: nn.Module = build_network(config.model.encoder, 1000)
    groups = build_optimizer(network, config.optim, LayerDecay(network, config.optim.layer_decay).scale).param_groups
    rates = {group["lr_scale"] for group in groups}
    assert max(rates) == pytest.approx(1.0)
    stem = RECIPES[name].stem_scale if name in RECIPES else 0.7**7
    assert min(rates) == pytest.approx(stem, rel=1e-5)


@pytest.mark.parametrize("name", [*RECIPES, "small"])
@pytest.mark.usefixtures("shallow", "one_thread")
def test_network_takes_a_step(name: str, tmp_path: Path) -> None:
    # As published but for depth, the size of image and batch, and the precision.
    small = ["data.train_crop=32", "data.test_resize=36", "data.test_crop=32", "data.workers=0", "data.cache=true"]
    images = write_classes(tmp_path / "images", train=2, val=1)
    config = load(name, f"data.root={images}", *small, "train.batch_size=6", "train.precision=fp32")
    task = Finetuning(config, find_labelled(config.data, 0), CPU)
    precision = Precision("fp32", CPU)
    optimizer = build_optimizer(task.model, config.optim, task.lr_scale)
    schedule = build_schedule(config.optim, config.train, task.steps_per_epoch)
    state = TrainState(task.model, optimizer, precision.scaler)
    before = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    stepper = Stepper(task, state, schedule, precision, seed=0, clip_norm=config.optim.clip_norm)
    values = take_step(stepper, [next(iter(task.batches(Share(config.train.batch_size, 1, config.run.seed), 0)))])
    assert values["loss"] > 0
    assert_initial_classifier(before, config.model.classifier_std)
    head = next(key for key in before if key.endswith(("fc.weight", "classifier.2.weight")))
    assert not torch.equal(task.model.state_dict()[head], before[head])
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(schedule.lr(0) * group["lr_scale"])
    assert len({group["lr"] for group in optimizer.param_groups}) > 4
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, config.optim.weight_decay}
    if task.ema is not None:
        torch.testing.assert_close(task.ema.module.state_dict()[head], task.model.state_dict()[head])


def assert_initial_classifier(state: dict[str, torch.Tensor], std: float | None) -> None:
    """Of mmpretrain's ResNet normal, else torch's default for ResNets and as all layers for ConvNeXts, bias 0."""
    weight = next(state[key] for key in state if key.endswith(("fc.weight", "classifier.2.weight")))
    bias = next(state[key] for key in state if key.endswith(("fc.bias", "classifier.2.bias")))
    uniform = std is None and "conv1.weight" in state
    largest = weight.shape[1] ** -0.5
    expected = largest / 3**0.5 if uniform else std or 0.02
    assert weight.std().item() == pytest.approx(expected, rel=5 / (2 * weight.numel()) ** 0.5)
    assert (weight.abs().max() <= largest) == uniform
    assert bias.any() == uniform
