"""The ranges of a configuration's values."""

import math
from collections.abc import Iterator

from spark_me.config_data import INTERPOLATIONS, LARGEST_AREA, Rule, data_rules, statistics_rules
from spark_me.config_finetune import (
    LOSSES,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneModelConfig,
    FinetuneTrainConfig,
)
from spark_me.config_schema import Config, ModelConfig, OptimConfig, RunConfig, TrainConfig
from spark_me.errors import UserError
from spark_me.initial_weights import INITIAL_WEIGHTS
from spark_me.networks import patch_size_of, require_known

BACKENDS = ("native", "minkowski")  # spark_me.sparse.BACKENDS, which needs the engine to be imported
OPTIMIZERS = ("lamb", "adamw")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def rules(config: Config) -> Iterator[Rule]:
    """Every range check of a pretraining run, by and large in the order of the keys."""
    yield from _model_rules(config.model)
    yield from data_rules(config.data, config.model.in_channels)
    yield from _optim_rules(config.optim)
    yield from _train_rules(config.train)
    yield from _warmup_rules(config.optim, config.train)
    yield from _run_rules(config.run)


def finetune_rules(config: FinetuneConfig) -> Iterator[Rule]:
    """Every range check of a fine-tuning run, in the order of the keys."""
    start = "must name what to start from: add weights=PATH, or weights=none to start from scratch"
    yield "weights", bool(config.weights), start
    yield from _finetune_model_rules(config.model)
    yield from _finetune_data_rules(config.data, config.model.in_channels)
    yield from _optim_rules(config.optim)
    yield "optim.layer_decay", 0 < config.optim.layer_decay <= 1, "must lie in (0, 1]; 1 for none"
    yield from _train_rules(config.train)
    yield from _finetune_train_rules(config.train)
    yield from _warmup_rules(config.optim, config.train)
    yield from _run_rules(config.run)


def _model_rules(model: ModelConfig) -> Iterator[Rule]:
    patch, problem = _patch_size(model.encoder)
    yield "model.encoder", not problem, problem
    yield "model.backend", model.backend in BACKENDS, f"must be one of {', '.join(BACKENDS)}"
    size = model.image_size
    yield "model.image_size", len(size) == 2, "must be [height, width]"
    nearest = [max(1, round(side / patch)) * patch for side in size]
    yield "model.image_size", size == nearest, f"must be multiples of {patch}, for example {nearest}"
    yield "model.image_size", math.prod(size) <= LARGEST_AREA, f"must be at most {LARGEST_AREA} pixels, 2048 × 2048"
    yield "model.in_channels", model.in_channels >= 1, "must be at least 1, for example 3 (RGB)"
    yield "model.mask_ratio", 0 < model.mask_ratio < 1, "must lie between 0 and 1, for example 0.6"
    width = model.decoder_width
    yield "model.decoder_width", width > 0 and width % patch == 0, f"must be a positive multiple of {patch}"
    yield "model.drop_path", model.drop_path is None or 0 <= model.drop_path < 1, "must be null or in [0, 1)"
    yield "model.init", model.init in INITIAL_WEIGHTS, f"must be one of {', '.join(INITIAL_WEIGHTS)}"
    yield "model.init_from", model.init_from != "", "must be null, a published name, a path or a URL"


def _patch_size(encoder: str) -> tuple[int, str]:
    """Of an encoder, and what is wrong with it: nothing as a rule."""
    try:
        require_known(encoder)
        return patch_size_of(encoder), ""
    except UserError as error:
        return 1, str(error)


def _optim_rules(optim: OptimConfig) -> Iterator[Rule]:
    yield "optim.name", optim.name in OPTIMIZERS, f"must be one of {', '.join(OPTIMIZERS)}"
    yield "optim.base_lr", optim.base_lr > 0, "must be positive"
    yield "optim.betas", len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas), "must be two in [0, 1)"
    yield "optim.weight_decay", optim.weight_decay >= 0, "must not be negative"
    yield "optim.weight_decay_end", optim.weight_decay_end >= 0, "must not be negative"
    yield "optim.warmup_start_factor", 0 <= optim.warmup_start_factor <= 1, "must be a share of the peak in [0, 1]"
    yield "optim.end_factor", 0 <= optim.end_factor <= 1, "must be a share of the peak in [0, 1]"
    yield "optim.clip_norm", optim.clip_norm is None or optim.clip_norm > 0, "must be null or positive"
    largest = optim.lamb.max_grad_norm
    yield "optim.lamb.max_grad_norm", largest is None or largest > 0, "must be null or positive"


def _train_rules(train: TrainConfig) -> Iterator[Rule]:
    epochs, steps = train.epochs, train.steps
    yield "train.epochs", epochs is not None or steps is not None, "must be given, or train.steps"
    yield "train.steps", epochs is None or steps is None, "must be null, or add train.epochs=null"
    yield "train.epochs", epochs is None or epochs >= 1, "must be at least 1"
    yield "train.steps", steps is None or steps >= 1, "must be at least 1"
    yield "train.batch_size", train.batch_size >= 1, "must be at least 1"
    yield "train.accumulate", train.accumulate >= 1, "must be at least 1"
    yield "train.precision", train.precision in PRECISIONS, f"must be one of {', '.join(PRECISIONS)}"


def _warmup_rules(optim: OptimConfig, train: TrainConfig) -> Iterator[Rule]:
    epochs, share = optim.warmup_epochs, optim.warmup_share
    yield "optim.warmup_share", epochs is None or share is None, "must be null, or add optim.warmup_epochs=null"
    yield "optim.warmup_epochs", epochs is not None or share is not None, "must be given, or optim.warmup_share"
    in_steps = epochs is not None and train.steps is not None
    instead = "must be null with train.steps: give optim.warmup_share, for example 0.05"
    yield "optim.warmup_epochs", not in_steps, instead
    # A wrong train.epochs is named by its own rule.
    fits = epochs is None or train.epochs is None or train.epochs < 1 or 0 <= epochs <= train.epochs
    yield "optim.warmup_epochs", fits, f"must lie between 0 and train.epochs={train.epochs}"
    yield "optim.warmup_share", share is None or 0 <= share <= 1, "must be a share of the run in [0, 1]"


def _run_rules(run: RunConfig) -> Iterator[Rule]:
    yield "run.dir", bool(run.dir), "must name a directory"
    yield "run.resume", bool(run.resume), "must be auto, never or a checkpoint's path"
    yield "run.seed", 0 <= run.seed < 2**63, "must not be negative"
    every = run.checkpoint_every_steps
    yield "run.checkpoint_every_steps", every is None or every >= 1, "must be null or at least 1"
    yield "run.keep_last", run.keep_last >= 1, "must be at least 1"
    yield "run.log_every_steps", run.log_every_steps >= 1, "must be at least 1"
    yield "run.print_every_steps", run.print_every_steps >= 1, "must be at least 1"
    yield "run.evaluate_every_epochs", run.evaluate_every_epochs >= 1, "must be at least 1"
    yield "run.picture_every_epochs", run.picture_every_epochs >= 1, "must be at least 1"


def _finetune_model_rules(model: FinetuneModelConfig) -> Iterator[Rule]:
    _, problem = _patch_size(model.encoder)
    yield "model.encoder", not problem, problem
    yield "model.in_channels", model.in_channels >= 1, "must be at least 1, for example 3 (RGB)"
    yield "model.drop_path", 0 <= model.drop_path < 1, "must be in [0, 1)"
    yield "model.classifier_std", model.classifier_std is None or model.classifier_std >= 0, "must not be negative"


def _finetune_data_rules(data: FinetuneDataConfig, channels: int) -> Iterator[Rule]:
    yield "data.root", bool(data.root), "must name your images: add data.root=/path/to/folder/above/train/and/val"
    yield "data.fraction", 0 < data.fraction <= 1, "must be a share in (0, 1]"
    yield "data.repeats", data.repeats >= 1, "must be at least 1"
    yield "data.repeated_augmentation", data.repeated_augmentation >= 1, "must be at least 1; 1 for none"
    largest = math.isqrt(LARGEST_AREA)
    crop = data.train_crop
    yield "data.train_crop", crop is None or 1 <= crop <= largest, f"must be null or in [1, {largest}]"
    scale = data.crop_scale
    yield "data.crop_scale", len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "must be [smallest, largest] in (0, 1]"
    yield "data.flip", 0 <= data.flip <= 1, "must be a probability"
    colours = not data.trivial_augment or channels in (1, 3)
    yield "data.trivial_augment", colours, f"must be false for model.in_channels={channels}: it changes colours"
    yield "data.erasing", 0 <= data.erasing <= 1, "must be a probability"
    yield "data.interpolation", data.interpolation in INTERPOLATIONS, f"must be one of {', '.join(INTERPOLATIONS)}"
    resize, crop = data.test_resize, data.test_crop
    yield "data.test_resize", resize is None or 1 <= resize <= largest, f"must be null or in [1, {largest}]"
    fits = crop is None or 1 <= crop <= (crop if resize is None else resize)
    yield "data.test_crop", fits, "must be null, or lie between 1 and data.test_resize"
    # What is null is settled by the weights.
    for key, values in (("data.mean", data.mean), ("data.std", data.std)):
        if values is not None:
            yield from statistics_rules(key, values, channels)
    yield "data.std", data.std is None or all(value > 0 for value in data.std), "must be positive"
    yield "data.workers", data.workers >= 0, "must not be negative"
    yield "data.max_unreadable", 0 <= data.max_unreadable < 1, "must be a share in [0, 1)"


def _finetune_train_rules(train: FinetuneTrainConfig) -> Iterator[Rule]:
    yield "train.loss", train.loss in LOSSES, f"must be one of {', '.join(LOSSES)}"
    yield "train.label_smoothing", 0 <= train.label_smoothing < 1, "must be a share in [0, 1)"
    yield "train.mixup", train.mixup >= 0, "must not be negative; 0 for none"
    yield "train.cutmix", train.cutmix >= 0, "must not be negative; 0 for none"
    yield "train.ema", train.ema is None or 0 < train.ema < 1, "must be null or lie between 0 and 1"
