"""The ranges of a configuration's values."""

from collections.abc import Iterator

from spark_me.config_schema import Config, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from spark_me.encoders import list_encoders

BACKENDS = ("fused", "minkowski")  # spark_me.sparse.BACKENDS, which needs the engine to be imported
DATA_KINDS = ("images", "imagefolder", "list", "demo")
INTERPOLATIONS = ("bicubic", "bilinear")
OPTIMIZERS = ("lamb", "adamw")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

# Key, whether its value is good, what it has to be.
Rule = tuple[str, bool, str]


def rules(config: Config) -> Iterator[Rule]:
    """Every range check, in the order of the keys."""
    yield from _model_rules(config.model)
    yield from _data_rules(config.data, config.model.in_channels)
    yield from _optim_rules(config.optim, config.train.epochs)
    yield from _train_rules(config.train)
    yield from _run_rules(config.run)


def _model_rules(model: ModelConfig) -> Iterator[Rule]:
    yield "model.encoder", model.encoder in list_encoders(), f"must be one of {', '.join(list_encoders())}"
    yield "model.backend", model.backend in BACKENDS, f"must be one of {', '.join(BACKENDS)}"
    size = model.image_size
    yield "model.image_size", len(size) == 2, "must be [height, width]"
    nearest = [max(32, round(side / 32) * 32) for side in size]
    yield "model.image_size", size == nearest, f"must be multiples of 32, for example {nearest}"
    yield "model.in_channels", model.in_channels in (1, 3), "must be 3 (RGB) or 1 (grey)"
    yield "model.mask_ratio", 0 < model.mask_ratio < 1, "must lie between 0 and 1, for example 0.6"
    width = model.decoder_width
    yield "model.decoder_width", width >= 32 and width % 32 == 0, "must be a positive multiple of 32"
    yield "model.drop_path", model.drop_path is None or 0 <= model.drop_path < 1, "must be null or in [0, 1)"


def _data_rules(data: DataConfig, channels: int) -> Iterator[Rule]:
    demo = data.kind == "demo"
    yield "data.kind", data.kind in DATA_KINDS, f"must be one of {', '.join(DATA_KINDS)}"
    yield "data.root", demo or bool(data.root), "must name your images: add data.root=/path/to/images"
    yield "data.root", not demo or data.root is None, "must be null for data.kind=demo, which has its own photos"
    yield "data.val_root", not demo or data.val_root is None, "must be null for data.kind=demo"
    yield "data.held_out", data.held_out >= 0, "must not be negative"
    own = demo or data.val_root is not None
    yield "data.held_out", not (own and data.held_out), "must be 0 with data.val_root or data.kind=demo"
    yield "data.repeats", data.repeats >= 1, "must be at least 1"
    scale = data.crop_scale
    yield "data.crop_scale", len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "must be [smallest, largest] in (0, 1]"
    yield "data.flip", 0 <= data.flip <= 1, "must be a probability"
    yield "data.interpolation", data.interpolation in INTERPOLATIONS, f"must be one of {', '.join(INTERPOLATIONS)}"
    yield "data.mean", len(data.mean) == channels, f"must have model.in_channels={channels} values"
    yield "data.std", len(data.std) == channels, f"must have model.in_channels={channels} values"
    yield "data.std", all(value > 0 for value in data.std), "must be positive"
    yield "data.workers", data.workers >= 0, "must not be negative"
    yield "data.max_unreadable", 0 <= data.max_unreadable < 1, "must be a share in [0, 1)"


def _optim_rules(optim: OptimConfig, epochs: int) -> Iterator[Rule]:
    yield "optim.name", optim.name in OPTIMIZERS, f"must be one of {', '.join(OPTIMIZERS)}"
    yield "optim.base_lr", optim.base_lr > 0, "must be positive"
    yield "optim.betas", len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas), "must be two in [0, 1)"
    yield "optim.weight_decay", optim.weight_decay >= 0, "must not be negative"
    yield "optim.weight_decay_end", optim.weight_decay_end >= 0, "must not be negative"
    warmup_fits = 0 <= optim.warmup_epochs <= epochs or epochs < 1  # a wrong train.epochs is named by its own rule
    yield "optim.warmup_epochs", warmup_fits, f"must lie between 0 and train.epochs={epochs}"
    yield "optim.warmup_start_factor", 0 <= optim.warmup_start_factor <= 1, "must be a share of the peak in [0, 1]"
    yield "optim.end_factor", 0 <= optim.end_factor <= 1, "must be a share of the peak in [0, 1]"
    yield "optim.clip_norm", optim.clip_norm is None or optim.clip_norm > 0, "must be null or positive"


def _train_rules(train: TrainConfig) -> Iterator[Rule]:
    yield "train.epochs", train.epochs >= 1, "must be at least 1"
    yield "train.batch_size", train.batch_size >= 1, "must be at least 1"
    yield "train.accumulate", train.accumulate >= 1, "must be at least 1"
    yield "train.precision", train.precision in PRECISIONS, f"must be one of {', '.join(PRECISIONS)}"


def _run_rules(run: RunConfig) -> Iterator[Rule]:
    yield "run.dir", bool(run.dir), "must name a directory"
    yield "run.resume", bool(run.resume), "must be auto, never or a checkpoint's path"
    yield "run.seed", 0 <= run.seed < 2**63, "must not be negative"
    every = run.checkpoint_every_steps
    yield "run.checkpoint_every_steps", every is None or every >= 1, "must be null or at least 1"
    yield "run.keep_last", run.keep_last >= 1, "must be at least 1"
    yield "run.log_every_steps", run.log_every_steps >= 1, "must be at least 1"
    yield "run.evaluate_every_epochs", run.evaluate_every_epochs >= 1, "must be at least 1"
    yield "run.picture_every_epochs", run.picture_every_epochs >= 1, "must be at least 1"
