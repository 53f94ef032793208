"""Every configuration that is shipped: its numbers are the published ones, its model is built and takes a step."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_runs import take_step, write_images
from torch import nn

from spark_me.config.loading import load_config
from spark_me.data.files import find_files
from spark_me.data.sampler import Share
from spark_me.decoder import ConvNeXtDecoder
from spark_me.spark import SparK
from spark_me.train.checkpoint import TrainState
from spark_me.train.distributed import Precision
from spark_me.train.pretrain import Pretraining
from spark_me.train.reconstruct import model_of
from spark_me.train.schedules import build_optimizer, build_schedule, count_steps_per_epoch
from spark_me.train.step import Stepper

CONFIGS = Path(__file__).parents[1] / "configs"
PRETRAIN = CONFIGS / "pretrain"
IMAGENET = 1_281_167
CPU = torch.device("cpu")


class Source(NamedTuple):
    """What the recipes of one source have in common, written down from it."""

    decoder_width: int
    smallest_crop: float
    precision: str
    first_lr: float
    peak_lr: float
    last_lr: float
    init: str
    inner_clip: float | None
    """At which norm LAMB itself clips, after the step's clipping."""
    optimizer: str = "lamb"
    weight_decay: tuple[float, float] = (0.04, 0.2)
    """Of the first and the last step."""
    clip: float | None = 5.0
    decoder: str = "unet"
    drop_last: bool = False


class Recipe(NamedTuple):
    """A recipe as published. Learning rates are at its total batch."""

    source: Source
    encoder: str
    drop_path: float
    epochs: int
    lr_half_way: float
    """At half of the epochs: (e/2 − w) / (e − w) of the cosine from the peak to the end."""
    warmup_epochs: int = 40
    beta2: float = 0.95
    batch_size: int = 4096
    side: int = 224
    mask_ratio: float = 0.6


MMPRETRAIN = Source(512, 0.2, "bf16", 1.6e-7, 1.6e-3, 0.0, "mmpretrain", 1.0)
OFFICIAL = Source(768, 0.67, "tf32", 1.6e-5, 3.2e-3, 3.2e-6, "official", None)
FCMAE = Source(512, 0.2, "tf32", 0.0, 2.4e-3, 0.0, "official", None, "adamw", (0.05, 0.05), None, "block", True)
BASES = {MMPRETRAIN: "mmpretrain", OFFICIAL: "official", FCMAE: "fcmae"}
STEPS_OF_EPOCH = {4096: 313, 2048: 626}
"""The last batch is filled up, or else dropped: 1,281,167 images are 312.8 and 625.6 of them."""
RECIPES = {
    "spark_sparse-resnet50_8xb512-amp-coslr-800e_in1k": Recipe(MMPRETRAIN, "resnet50", 0.05, 800, 8.66063e-4),
    "spark_sparse-resnet50_8xb512-amp-coslr-1600e_in1k": Recipe(MMPRETRAIN, "resnet50", 0.05, 1600, 8.32213e-4),
    "spark_sparse-convnextv2-tiny_16xb256-amp-coslr-800e_in1k": Recipe(
        MMPRETRAIN, "convnextv2_tiny", 0.2, 800, 8.32213e-4, warmup_epochs=20
    ),
    "spark_sparse-convnext-small_16xb256-amp-coslr-800e_in1k": Recipe(
        MMPRETRAIN, "convnext_small", 0.2, 800, 8.66063e-4
    ),
    "spark_resnet50_1600e_in1k": Recipe(OFFICIAL, "resnet50", 0.05, 1600, 1.665961e-3),
    "spark_resnet101_1600e_in1k": Recipe(OFFICIAL, "resnet101", 0.08, 1600, 1.665961e-3),
    "spark_resnet152_1600e_in1k": Recipe(OFFICIAL, "resnet152", 0.10, 1600, 1.665961e-3),
    "spark_resnet200_1600e_in1k": Recipe(OFFICIAL, "resnet200", 0.15, 1600, 1.665961e-3),
    "spark_convnext-small_1600e_in1k": Recipe(OFFICIAL, "convnext_small", 0.2, 1600, 1.665961e-3, beta2=0.999),
    "spark_convnext-base_1600e_in1k": Recipe(OFFICIAL, "convnext_base", 0.3, 1600, 1.665961e-3, beta2=0.999),
    "spark_convnext-large_1600e_in1k": Recipe(OFFICIAL, "convnext_large", 0.4, 1600, 1.665961e-3, beta2=0.999),
    "spark_convnext-large-384_1600e_in1k": Recipe(
        OFFICIAL, "convnext_large", 0.4, 1600, 1.665961e-3, beta2=0.999, batch_size=2048, side=384, mask_ratio=0.75
    ),
    **{
        f"fcmae_convnextv2_{size}_1600e_in1k": Recipe(FCMAE, f"convnextv2_{size}", 0.0, 1600, 1.24832e-3)
        for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
    },
}
DECAYED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def test_every_recipe_is_in_the_table() -> None:
    names = {path.stem for path in PRETRAIN.glob("*.yaml") if not path.stem.startswith("base")}
    assert names == {*RECIPES, "small"}


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_are_the_published_ones(name: str) -> None:
    recipe, config = RECIPES[name], load_config(PRETRAIN / f"{name}.yaml", ["data.root=imagenet"])
    source = recipe.source
    assert (config.model.encoder, config.model.drop_path) == (recipe.encoder, recipe.drop_path)
    assert config.model.image_size == [recipe.side, recipe.side]
    assert (config.model.mask_ratio, config.model.decoder_width) == (recipe.mask_ratio, source.decoder_width)
    assert (config.data.kind, config.data.interpolation, config.data.flip) == ("imagenet", "bicubic", 0.5)
    assert config.data.crop_scale == [source.smallest_crop, 1.0]
    assert [255 * value for value in config.data.mean or []] == pytest.approx([123.675, 116.28, 103.53])
    assert [255 * value for value in config.data.std or []] == pytest.approx([58.395, 57.12, 57.375])
    assert (config.optim.name, config.optim.betas) == (source.optimizer, [0.9, recipe.beta2])
    assert (config.optim.clip_norm, config.model.decoder) == (source.clip, source.decoder)
    assert asdict(config.optim.lamb) == {
        "max_grad_norm": source.inner_clip,
        "bias_correction": True,
        "always_adapt": False,
    }
    assert (config.model.init, config.model.zero_init_residual) == (source.init, None)
    assert (config.train.epochs, config.train.batch_size) == (recipe.epochs, recipe.batch_size)
    assert config.train.precision == source.precision


@pytest.mark.parametrize("name", RECIPES)
def test_curves_are_the_published_ones(name: str) -> None:
    recipe, config = RECIPES[name], load_config(PRETRAIN / f"{name}.yaml", ["data.root=imagenet"])
    each = STEPS_OF_EPOCH[recipe.batch_size] - recipe.source.drop_last
    assert count_steps_per_epoch(IMAGENET, config.data, config.train.batch_size) == each
    schedule = build_schedule(config.optim, config.train, each)
    last = recipe.epochs * each - 1
    assert schedule.steps == last + 1
    warm = recipe.warmup_epochs * each
    source = recipe.source
    assert schedule.lr(0) == pytest.approx(source.first_lr)
    assert schedule.lr(warm // 2) == pytest.approx((source.first_lr + source.peak_lr) / 2, rel=1e-9)
    assert schedule.lr(warm) == pytest.approx(source.peak_lr)
    assert schedule.lr(warm - 1) < source.peak_lr > schedule.lr(warm + 1)
    assert schedule.lr(recipe.epochs * each // 2) == pytest.approx(recipe.lr_half_way, rel=1e-4)
    assert schedule.lr(last) == pytest.approx(source.last_lr, abs=1e-15)
    first, end = source.weight_decay
    decays = [schedule.decay(step) for step in (0, last // 2, last)]
    assert decays == pytest.approx([first, (first + end) / 2, end], rel=1e-4)


def test_small_data_warms_up_for_a_share_of_its_steps() -> None:
    config = load_config(PRETRAIN / "small.yaml", ["data.root=images"])
    for images in (2, 300):  # steps an epoch
        schedule = build_schedule(config.optim, config.train, images)
        assert (schedule.steps, schedule.warmup_steps) == (20_000, 1_000)
        assert schedule.lr(1_000) == pytest.approx(1e-3)
        assert schedule.lr(19_999) == pytest.approx(1e-6)


# Of recipes that differ in their lengths and images alone, one.
@pytest.mark.parametrize(
    "name", [*{recipe[:3]: name for name, recipe in RECIPES.items() if "huge" not in name}.values(), "small"]
)
def test_model_takes_a_step(name: str, tmp_path: Path, shallow: None, one_thread: None) -> None:
    # As published but for depth, the size of image and batch, a learning rate whose first step is seen, and TF32.
    config = load_config(
        PRETRAIN / f"{name}.yaml",
        [
            f"data.root={write_images(tmp_path / 'images', 2)}",
            *("data.kind=images", "data.workers=0", "data.held_out=0", "data.repeats=1"),
            *("model.image_size=[64,64]", "train.batch_size=2", "optim.base_lr=0.01"),
            *["optim.warmup_start_factor=0.005"] * (name.startswith("fcmae")),  # their first rate is zero
        ],
    )
    if config.train.precision == "tf32":
        config.train.precision = "fp32"
    task = Pretraining(config, find_files(config.data), CPU)
    assert_initial_weights(task.model, RECIPES[name].source.init if name in RECIPES else "official")
    optimizer = build_optimizer(task.model, config.optim)
    assert_decay_reaches_weights_alone(task.model, optimizer)
    precision = Precision(config.train.precision, CPU)
    state = TrainState(task.model, optimizer, precision.scaler)
    watched = next(task.model.encoder.parameters())
    before = watched.detach().clone()
    schedule = build_schedule(config.optim, config.train, 1)
    stepper = Stepper(task, state, schedule, precision, seed=0, clip_norm=config.optim.clip_norm)
    values = take_step(stepper, [next(iter(task.batches(Share(config.train.batch_size, 1, config.run.seed), 0)))])
    assert math.isfinite(values["loss"]) and 0.5 < values["loss"] < (3 if config.model.init == "official" else 40)
    assert not torch.equal(watched, before) and watched.isfinite().all()


def assert_initial_weights(model: SparK, source: str) -> None:
    """Every tensor is distributed as the source's own code starts it."""
    for module in model.encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            by_fan = (2 / (module.weight[0, 0].numel() * len(module.weight))) ** 0.5
            assert_normal(module.weight, by_fan if model.encoder.network.startswith("resnet") else 0.02)
            assert module.bias is None or not module.bias.any()
    if isinstance(model.decoder, ConvNeXtDecoder):
        for module in (*model.decoder.modules(), model.densify.projection):
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert_normal(module.weight, 0.02)
                assert not module.bias.any()
        assert_normal(model.densify.mask_token, 0.02)
        return
    blocks = model.decoder.blocks
    for block in blocks:
        width = block.upsample.in_channels
        assert_normal(block.upsample.weight, (2 / (16 * width)) ** 0.5)  # by fan-out, as torch counts it: Cin · 4 · 4
        for convolution in (block.conv1, block.conv2):
            by_fan = (2 / (9 * convolution.out_channels)) ** 0.5
            assert_normal(convolution.weight, by_fan if source == "mmpretrain" else 0.02)
    assert_normal(model.decoder.projection.weight, (2 / 3) ** 0.5 if source == "mmpretrain" else 0.02)
    assert not any(
        tensor.any() for tensor in (model.decoder.projection.bias, *(block.upsample.bias for block in blocks))
    )
    for densify in model.densify:
        token = densify.mask_token
        assert token.abs().max() <= 0.02
        assert token.std().item() == pytest.approx(0.0108, rel=5 / token.numel() ** 0.5)
        if isinstance(densify.projection, nn.Conv2d):
            largest = densify.projection.weight[0].numel() ** -0.5
            for tensor in (densify.projection.weight, densify.projection.bias):
                assert 0.9 * largest < tensor.abs().max() <= largest
                assert tensor.std().item() == pytest.approx(largest / 3**0.5, rel=5 / tensor.numel() ** 0.5)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            ends_branch = name.startswith("encoder.layer") and name.endswith(".bn3")
            assert (module.weight == (0 if ends_branch and source == "official" else 1)).all() and not module.bias.any()


def assert_normal(weight: torch.Tensor, std: float) -> None:
    # Of millions of values torch's truncated normal gives a few its bound of ±2, a hundred deviations off.
    weight = weight.clamp(-6 * std, 6 * std)
    assert weight.std().item() == pytest.approx(std, rel=5 / (2 * weight.numel()) ** 0.5)
    assert weight.mean().item() == pytest.approx(0, abs=5 * std / weight.numel() ** 0.5)
    assert weight.abs().max() > 2.2 * std or weight.numel() < 100  # has a normal distribution's tails


def assert_decay_reaches_weights_alone(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights of convolutions and linear layers decay; norms, biases, layer scale and mask tokens do not."""
    expected = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, DECAYED)
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    }
    decayed, free = optimizer.param_groups
    assert (decayed["decayed"], free["decayed"]) == (True, False)
    assert {id(parameter) for parameter in decayed["params"]} == expected
    assert {id(parameter) for parameter in free["params"]} == {id(p) for p in model.parameters()} - expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Counted in the published checkpoints; the official width by the published implementation.
    [
        ("spark_sparse-resnet50_8xb512-amp-coslr-800e_in1k", 37_970_611),
        ("spark_sparse-convnextv2-tiny_16xb256-amp-coslr-800e_in1k", 39_729_619),
        ("spark_resnet50_1600e_in1k", 52_921_835),
    ],
)
def test_models_have_the_published_size(name: str, parameters: int) -> None:
    config = load_config(PRETRAIN / f"{name}.yaml", ["data.root=imagenet"])
    assert sum(parameter.numel() for parameter in model_of(config.model).parameters()) == parameters


def test_recipes_inherit_from_their_source_and_say_their_command() -> None:
    for name, recipe in RECIPES.items():
        text = (PRETRAIN / f"{name}.yaml").read_text()
        assert f"\nbase: base_{BASES[recipe.source]}.yaml\n" in text
        assert f"configs/pretrain/{name}.yaml" in text
