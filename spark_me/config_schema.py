"""What a configuration may hold: every key with its type, default and meaning, and the ranges of the values."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from spark_me.config_data import PATCH_SIZE, DataConfig, Rule, data_rules
from spark_me.encoders import list_encoders


@dataclass
class ModelConfig:
    """The network that is pretrained."""

    encoder: str = "resnet50"
    """Name of the encoder, for example resnet50 or convnextv2_tiny."""
    backend: str = "fused"
    """How the sparse layers compute: fused (our kernels) or minkowski (the engine's own)."""
    image_size: list[int] = field(default_factory=lambda: [224, 224])
    """[height, width] of the training images in pixels; both multiples of 32, they may differ."""
    in_channels: int = 3
    """3 reads images as RGB, 1 as grey; any other number takes images of exactly so many channels."""
    mask_ratio: float = 0.6
    """Share of the patches that are hidden."""
    decoder_width: int = 512
    """Channels at the decoder's entry."""
    drop_path: float | None = None
    """Largest stochastic-depth rate; null takes the encoder's default."""


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "lamb"
    """lamb or adamw."""
    base_lr: float = 2e-4
    """Peak learning rate for 256 images a batch; the run's peak is base_lr · batch_size / 256."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the averages of the gradient and of its square."""
    weight_decay: float = 0.04
    """Weight decay of the first step; none on norms, biases, other vectors and mask tokens."""
    weight_decay_end: float = 0.2
    """Weight decay that the cosine reaches at the last step."""
    warmup_epochs: float = 40
    """Epochs of linear warm-up, counted in steps."""
    warmup_start_factor: float = 0.005
    """Where the warm-up starts, as a share of the peak."""
    end_factor: float = 0.001
    """Where the cosine ends, as a share of the peak."""
    clip_norm: float | None = 5.0
    """Largest norm of the gradient; null does not clip."""


@dataclass
class TrainConfig:
    """How long and in what portions."""

    epochs: int = 1600
    """Passes over the images."""
    batch_size: int = 4096
    """Images in a step, over all processes together."""
    precision: str = "fp32"
    """fp32, or bf16 for autocast of the dense parts."""


@dataclass
class RunConfig:
    """Where the run lives and what it writes."""

    dir: str = "runs/pretrain"
    """Everything the run writes goes here; a directory belongs to one configuration."""
    resume: str = "auto"
    """auto: from the newest checkpoint in run.dir, if any. never: refuse to if there is one. Or a checkpoint's path."""
    seed: int = 0
    """Decides the initial weights, order of images, crops and masks."""
    device: str = "auto"
    """auto takes CUDA where there is one; or cpu, cuda, cuda:1."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints, besides the one at the end of each epoch; null: none besides."""
    keep_last: int = 3
    """How many of the newest checkpoints are kept."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every_epochs: int = 1
    """Epochs between held-out losses and pictures."""


@dataclass
class Config:
    """A whole run: the sections of a YAML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


# Keys that change neither the weights a run arrives at nor the pictures of it: a resumed run may change them.
FREE_KEYS = frozenset(
    {
        "data.workers",
        "data.max_unreadable",
        "model.backend",
        "run.dir",
        "run.resume",
        "run.device",
        "run.checkpoint_every_steps",
        "run.keep_last",
        "run.log_every_steps",
        "run.evaluate_every_epochs",
    }
)

BACKENDS = ("fused", "minkowski")  # spark_me.sparse.BACKENDS, which needs the engine to be imported
OPTIMIZERS = ("lamb", "adamw")
PRECISIONS = ("fp32", "bf16")


def rules(config: Config) -> Iterator[Rule]:
    """Every range check, in the order of the keys."""
    yield from _model_rules(config.model)
    yield from data_rules(config.data, config.model.in_channels)
    yield from _optim_rules(config.optim, config.train.epochs)
    yield from _train_rules(config.train)
    yield from _run_rules(config.run)


def _model_rules(model: ModelConfig) -> Iterator[Rule]:
    yield "model.encoder", model.encoder in list_encoders(), f"must be one of {', '.join(list_encoders())}"
    yield "model.backend", model.backend in BACKENDS, f"must be one of {', '.join(BACKENDS)}"
    size = model.image_size
    yield "model.image_size", len(size) == 2, "must be [height, width]"
    nearest = [max(1, round(side / PATCH_SIZE)) * PATCH_SIZE for side in size]
    yield "model.image_size", size == nearest, f"must be multiples of {PATCH_SIZE}, for example {nearest}"
    yield "model.in_channels", model.in_channels >= 1, "must be at least 1, for example 3 (RGB)"
    yield "model.mask_ratio", 0 < model.mask_ratio < 1, "must lie between 0 and 1, for example 0.6"
    width = model.decoder_width
    yield "model.decoder_width", width >= 32 and width % 32 == 0, "must be a positive multiple of 32"
    yield "model.drop_path", model.drop_path is None or 0 <= model.drop_path < 1, "must be null or in [0, 1)"


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
