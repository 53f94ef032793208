"""What a configuration may hold: every key with its type, default and meaning, and the ranges of the values."""

from collections.abc import Iterator
from dataclasses import dataclass, field

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
    """3 reads images as RGB, 1 as grey."""
    mask_ratio: float = 0.6
    """Share of the patches that are hidden."""
    decoder_width: int = 512
    """Channels at the decoder's entry."""
    drop_path: float | None = None
    """Largest stochastic-depth rate; null takes the encoder's default."""


@dataclass
class DataConfig:
    """The images. Nothing here needs labels."""

    kind: str = "images"
    """images: a folder at any depth. imagefolder: one folder a class. list: a text file of paths. demo: own photos."""
    root: str | None = None
    """The folder, or the text file for kind list (its paths are relative to it). Not for kind demo."""
    val_root: str | None = None
    """A second folder or list whose images are held out of training to measure the loss on."""
    held_out: int = 0
    """Without val_root: how many images of root, evenly spaced in the sorted list, are held out."""
    repeats: int = 1
    """How many crops of each image make one epoch; more than 1 is for data sets of a few images."""
    crop_scale: list[float] = field(default_factory=lambda: [0.67, 1.0])
    """Smallest and largest share of an image's area that a random crop takes."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    interpolation: str = "bicubic"
    """How crops are resized: bicubic or bilinear, antialiased."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """What is subtracted per channel, for values in 0 to 1 (ImageNet's)."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """What it is then divided by (ImageNet's)."""
    workers: int = 4
    """Processes that load images; 0 loads in the training process. The result does not depend on it."""
    max_unreadable: float = 0.01
    """Share of the files that may be unreadable (skipped and listed) before the run stops."""


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
DATA_KINDS = ("images", "imagefolder", "list", "demo")
INTERPOLATIONS = ("bicubic", "bilinear")
OPTIMIZERS = ("lamb", "adamw")
PRECISIONS = ("fp32", "bf16")

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
