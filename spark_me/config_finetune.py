"""What a configuration of a fine-tuning run may hold: every key with its type, default and meaning."""

from dataclasses import dataclass, field
from typing import TypeAlias

from spark_me.config_schema import Config, OptimConfig, RunConfig, TrainConfig

SCRATCH = "none"
"""`weights` of a run that starts from random ones."""
LOSSES = ("ce", "bce")


@dataclass
class FinetuneModelConfig:
    """The dense network that is trained; its classifier has one output a class of the data."""

    encoder: str = "resnet50"
    """Name of the encoder: of torchvision, timm/NAME, or one of your own; `spark-me encoders` lists them.
    Example: convnextv2_tiny."""
    in_channels: int = 3
    """3 reads images as RGB, 1 as grey; any other number takes images of exactly so many channels. Example: 1."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    classifier_std: float | None = None
    """Deviation of the classifier's initial weights, of a normal distribution, with biases of zero; null: as
    torchvision or timm starts it. Example: 0.01."""


@dataclass
class FinetuneDataConfig:
    """Labelled images: one folder a class. The sorted names of the folders are the classes."""

    root: str | None = None
    """The folder above train/ and val/, ImageNet's layout; with val_root, that of the training images itself."""
    val_root: str | None = None
    """The class folders of the images that accuracy is measured on, if they are not in root/val."""
    fraction: float = 1.0
    """Share of the training images that is used: of each class alike, at least one, drawn by run.seed. Example: 0.1."""
    repeats: int = 1
    """How many crops of each image make one epoch; more than 1 is for data sets of a few images. Example: 16."""
    drop_last: bool = True
    """Leave out the images at an epoch's end that are no whole batch; false: fill their batch up, with the first images
    of the epoch, as the published recipes do."""
    repeated_augmentation: int = 1
    """Different crops of an image that a batch holds. An epoch is not longer for it: it has fewer of the images.
    Example: 3."""
    train_crop: int | None = None
    """Side of the training images in pixels; null: as the checkpoint in weights was trained on, or 224 where that is
    none of spark_me. Example: 192."""
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Smallest and largest share of an image's area that a random crop takes."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    trivial_augment: bool = False
    """TrivialAugmentWide: one random change of shape or colour, of random strength. For RGB and grey alone."""
    erasing: float = 0.0
    """Probability that a rectangle of 0.02 to 1/3 of a crop becomes noise. Example: 0.25."""
    interpolation: str = "bicubic"
    """How images are resized: bicubic or bilinear, antialiased."""
    test_resize: int | None = None
    """What the shorter edge of a test image is resized to, in pixels; null: test_crop / 0.95. Example: 236."""
    test_crop: int | None = None
    """Side of the centre of it that the network sees; null: train_crop. Example: 224."""
    mean: list[float] | None = None
    """Mean of each channel, which is subtracted; null: as for the checkpoint in weights, or ImageNet's where that is
    none of spark_me. 8-bit and 16-bit values count from 0 to 1, others as they are. `spark-me data stats` measures it.
    Example: [0.5, 0.5, 0.5]."""
    std: list[float] | None = None
    """Deviation of each channel, by which the difference is divided; null as for mean. Example: [0.25, 0.25, 0.25]."""
    workers: int = 4
    """Processes that load images, for each that trains; 0 loads in that itself. The result does not depend on it."""
    cache: bool = False
    """Keep every decoded image in memory, in each worker; for small data sets."""
    max_unreadable: float = 0.01
    """Share of the images that may be unreadable (skipped and listed) before the run stops."""


@dataclass
class FinetuneOptimConfig(OptimConfig):
    """The optimizer and its schedule."""

    name: str = "adamw"
    base_lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.05
    weight_decay_end: float = 0.05
    warmup_epochs: float | None = 5
    warmup_start_factor: float = 1e-4
    clip_norm: float | None = None
    layer_decay: float = 1.0
    """Each group of layers learns at so much of the rate of the next deeper one; the classifier at the full rate.
    1 for no difference. Example: 0.65."""


@dataclass
class FinetuneTrainConfig(TrainConfig):
    """How long, in what portions, and what for."""

    epochs: int | None = 300
    batch_size: int = 1024
    loss: str = "ce"
    """ce, cross-entropy of soft-max, or bce, binary cross-entropy of every class's sigmoid, summed over classes.
    Example: bce."""
    label_smoothing: float = 0.0
    """Share of a target that is spread evenly over all classes. Example: 0.1."""
    mixup: float = 0.0
    """MixUp's alpha; 0 for none. With CutMix, each batch is mixed by one of the two, drawn evenly.
    Example: 0.8."""
    cutmix: float = 0.0
    """CutMix's alpha; 0 for none. Example: 1.0."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is evaluated too; null: none.
    Example: 0.9999."""


@dataclass
class FinetuneRunConfig(RunConfig):
    """Where the run lives and what it writes."""

    dir: str = "runs/finetune"


@dataclass
class FinetuneConfig:
    """A whole fine-tuning run."""

    weights: str = ""
    """What it starts from: a published name, a path or URL of any known layout; none for random weights.
    Example: runs/pretrain/checkpoints/best.pt."""
    model: FinetuneModelConfig = field(default_factory=FinetuneModelConfig)
    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    run: FinetuneRunConfig = field(default_factory=FinetuneRunConfig)


AnyConfig: TypeAlias = Config | FinetuneConfig
"""Of any task of the trainer."""
