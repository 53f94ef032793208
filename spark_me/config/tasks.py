"""What a run may be told: the sections of a pretraining and of a fine-tuning configuration."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from spark_me.config.data import LARGEST_AREA, DataConfig, FinetuneDataConfig, Rule
from spark_me.config.training import OptimConfig, RunConfig, TrainConfig, warmup_rules
from spark_me.errors import UserError

BACKENDS = ("native", "minkowski")  # spark_me.sparse.BACKENDS, which needs the engine to be imported
DECODERS = ("unet", "block")  # spark_me.decoder.DECODERS, which needs torch
SCRATCH = "none"
"""`weights` of a run that starts from random ones."""
LOSSES = ("ce", "bce")


@dataclass
class ModelConfig:
    """The network that is pretrained."""

    encoder: str = "resnet50"
    """Name of the encoder: of torchvision, timm/NAME, or one of your own; `spark-me encoders` lists them.
    Example: convnextv2_tiny."""
    backend: str = "native"
    """How the sparse layers compute, with the same result: native (our kernels) or minkowski (the engine's own).
    Example: minkowski."""
    image_size: list[int] = field(default_factory=lambda: [224, 224])
    """[height, width] of the training images in pixels, or the side of a square: multiples of the encoder's total
    stride, 32 for most. Example: [192, 256]."""
    in_channels: int = 3
    """3 reads images as RGB, 1 as grey; any other number takes images of exactly so many channels. Example: 1."""
    mask_ratio: float = 0.6
    """Share of the patches that are hidden, in every image alike. Example: 0.75."""
    decoder: str = "unet"
    """unet, SparK's, with skips from all scales; or block, FCMAE's, one ConvNeXt V2 block on the deepest map, which
    costs little beside the encoder. Evidence (ConvNeXt V2, table 1, fine-tuned): UNet 83.7 %, one block 83.7 % in 0.6
    of the time; for ConvNeXt and fine-tuning alone. Example: block."""
    decoder_width: int = 512
    """Channels at the decoder's entry. unet halves them at each of its blocks: a multiple of the encoder's total
    stride; block takes any. Fewer are cheaper. Example: 256."""
    drop_path: float | None = None
    """Stochastic depth of the last block, the largest; null takes the encoder's default. Example: 0.1."""
    init: str = "official"
    """Initial weights as in the paper's own code (official) or in mmpretrain: the UNet's convolutions differ, and
    zero_init_residual. Example: mmpretrain."""
    zero_init_residual: bool | None = None
    """Start ResNets' residual branches at zero; null: as model.init does, official at zero, mmpretrain not. In a run of
    a few thousand steps from zero they open too little to be of use: there, false. Example: false."""
    init_from: str | None = None
    """Weights to start from: a published name, a path or URL of any known layout, whole model or encoder alone. null:
    random. Not read again by a run that goes on from its own checkpoint. Example: spark_sparse-resnet50_800e_in1k."""

    def rules(self) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        patch, problem = _patch_size(self.encoder)
        yield "model.encoder", not problem, problem
        yield "model.backend", self.backend in BACKENDS, f"must be one of {', '.join(BACKENDS)}"
        size = self.image_size
        yield "model.image_size", len(size) == 2, "must be [height, width]"
        nearest = [max(1, round(side / patch)) * patch for side in size]
        yield "model.image_size", size == nearest, f"must be multiples of {patch}, for example {nearest}"
        yield "model.image_size", math.prod(size) <= LARGEST_AREA, f"must be at most {LARGEST_AREA} pixels, 2048 × 2048"
        yield "model.in_channels", self.in_channels >= 1, "must be at least 1, for example 3 (RGB)"
        yield "model.mask_ratio", 0 < self.mask_ratio < 1, "must lie between 0 and 1, for example 0.6"
        yield "model.decoder", self.decoder in DECODERS, f"must be one of {', '.join(DECODERS)}"
        width, unit = self.decoder_width, 1 if self.decoder == "block" else patch
        yield "model.decoder_width", width > 0 and width % unit == 0, f"must be a positive multiple of {unit}"
        yield "model.drop_path", self.drop_path is None or 0 <= self.drop_path < 1, "must be null or in [0, 1)"
        from spark_me.initial_weights import INITIAL_WEIGHTS

        yield "model.init", self.init in INITIAL_WEIGHTS, f"must be one of {', '.join(INITIAL_WEIGHTS)}"
        yield "model.init_from", self.init_from != "", "must be null, a published name, a path or a URL"


@dataclass
class PretrainTrainConfig(TrainConfig):
    """How long, in what portions, and how it is computed."""

    activation_checkpointing: bool = False
    """Compute the activations inside encoder blocks twice instead of keeping them: less memory, the same result."""
    compile: bool = False
    """Compile the decoder, whose shapes are static. The encoder's depend on the masks and come from MinkowskiEngine's
    coordinate manager, which torch.compile cannot look into."""
    cuda_graph: str = "auto"
    """auto launches whole steps at once on a GPU, as a CUDA graph, where every step has the same shapes and the graph
    does in a trial what the step does; never does not. Example: never."""

    def rules(self) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        yield from super().rules()
        yield "train.cuda_graph", self.cuda_graph in ("auto", "never"), "must be auto or never"


@dataclass
class PretrainConfig:
    """A whole pretraining run: the sections of a YAML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: PretrainTrainConfig = field(default_factory=PretrainTrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def rules(self) -> Iterator[Rule]:
        """Every range check, by and large in the order of the keys."""
        yield from _rules_of_sections(self)


# Keys that change neither the weights a run arrives at nor the pictures of it: a resumed run may change them.
FREE_KEYS = frozenset(
    {
        "data.allow_pipe",
        "data.workers",
        "data.cache",
        "data.max_unreadable",
        "model.backend",
        "train.activation_checkpointing",
        "train.cuda_graph",
        "run.dir",
        "run.resume",
        "run.device",
        "run.checkpoint_every_steps",
        "run.keep_last",
        "run.log_every_steps",
        "run.print_every_steps",
        "run.evaluate_every_epochs",
        "run.picture_every_epochs",
    }
)


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

    def rules(self) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        _, problem = _patch_size(self.encoder)
        yield "model.encoder", not problem, problem
        yield "model.in_channels", self.in_channels >= 1, "must be at least 1, for example 3 (RGB)"
        yield "model.drop_path", 0 <= self.drop_path < 1, "must be in [0, 1)"
        yield "model.classifier_std", self.classifier_std is None or self.classifier_std >= 0, "must not be negative"


@dataclass
class FinetuneOptimConfig(OptimConfig):
    """The optimizer and its schedule."""

    name: str = "adamw"
    base_lr: float | None = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.05
    weight_decay_end: float = 0.05
    warmup_epochs: float | None = 5
    warmup_start_factor: float = 1e-4
    clip_norm: float | None = None
    layer_decay: float = 1.0
    """Each group of layers learns at so much of the rate of the next deeper one; the classifier at the full rate.
    1 for no difference. Example: 0.65."""

    def rules(self) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        yield from super().rules()
        yield "optim.layer_decay", 0 < self.layer_decay <= 1, "must lie in (0, 1]; 1 for none"


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

    def rules(self) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        yield from super().rules()
        yield "train.loss", self.loss in LOSSES, f"must be one of {', '.join(LOSSES)}"
        yield "train.label_smoothing", 0 <= self.label_smoothing < 1, "must be a share in [0, 1)"
        yield "train.mixup", self.mixup >= 0, "must not be negative; 0 for none"
        yield "train.cutmix", self.cutmix >= 0, "must not be negative; 0 for none"
        yield "train.ema", self.ema is None or 0 < self.ema < 1, "must be null or lie between 0 and 1"


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

    def rules(self) -> Iterator[Rule]:
        """Every range check, by and large in the order of the keys."""
        start = "must name what to start from: add weights=PATH, or weights=none to start from scratch"
        yield "weights", bool(self.weights), start
        yield from _rules_of_sections(self)


AnyConfig: TypeAlias = PretrainConfig | FinetuneConfig
"""Of any task of the trainer."""


def _rules_of_sections(config: AnyConfig) -> Iterator[Rule]:
    yield from config.model.rules()
    yield from config.data.rules(config.model.in_channels)
    yield from config.optim.rules()
    yield from config.train.rules()
    yield from warmup_rules(config.optim, config.train)
    yield from config.run.rules()


def _patch_size(encoder: str) -> tuple[int, str]:
    """Of an encoder, and what is wrong with it: nothing as a rule."""
    from spark_me.networks import patch_size_of, require_known  # torch is not needed to read about keys

    try:
        require_known(encoder)
        return patch_size_of(encoder), ""
    except UserError as error:
        return 1, str(error)
