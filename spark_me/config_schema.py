"""What a configuration may hold: every key with its type, default and meaning."""

from dataclasses import dataclass, field

from spark_me.config_data import DataConfig


@dataclass
class ModelConfig:
    """The network that is pretrained."""

    encoder: str = "resnet50"
    """Name of the encoder, for example resnet50 or convnextv2_tiny."""
    backend: str = "fused"
    """How the sparse layers compute: fused (our kernels) or minkowski (the engine's own)."""
    image_size: list[int] = field(default_factory=lambda: [224, 224])
    """[height, width] of the training images in pixels: multiples of the encoder's total stride, 32 for most."""
    in_channels: int = 3
    """3 reads images as RGB, 1 as grey; any other number takes images of exactly so many channels."""
    mask_ratio: float = 0.6
    """Share of the patches that are hidden."""
    decoder_width: int = 512
    """Channels at the decoder's entry."""
    drop_path: float | None = None
    """Largest stochastic-depth rate; null takes the encoder's default."""
    zero_init_residual: bool = True
    """Start ResNets' residual branches at zero, as published. In a run of a few thousand steps they open too little to
    be of use: there, false."""
    init_from: str | None = None
    """Weights to start from: a published name, a path or URL of any known layout, whole model or encoder alone. null:
    random. Not read again by a run that goes on from its own checkpoint."""


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
    warmup_epochs: float | None = 40
    """Epochs of linear warm-up, counted in steps; null with train.steps."""
    warmup_share: float | None = None
    """Linear warm-up as a share of the run, in place of warmup_epochs."""
    warmup_start_factor: float = 0.005
    """Where the warm-up starts, as a share of the peak."""
    end_factor: float = 0.001
    """Where the cosine ends, as a share of the peak."""
    clip_norm: float | None = 5.0
    """Largest norm of the gradient; null does not clip."""


@dataclass
class TrainConfig:
    """How long and in what portions, for any task."""

    epochs: int | None = 1600
    """Passes over the images; null with steps."""
    steps: int | None = None
    """Length of the run in steps, in place of epochs."""
    batch_size: int = 4096
    """Images in a step, over all processes together and all their micro-batches."""
    accumulate: int = 1
    """Micro-batches whose gradients make one step: a process has batch_size / (processes · accumulate) images at once.
    Loss and gradient are the whole batch's; batch norms see one micro-batch at a time, as they must."""
    precision: str = "fp32"
    """fp32; tf32 for its products (CUDA only); bf16 or fp16 (with a scaled loss) by autocast, weights in float32."""


@dataclass
class PretrainTrainConfig(TrainConfig):
    """The same, for pretraining."""

    activation_checkpointing: bool = False
    """Compute the activations inside encoder blocks twice instead of keeping them: less memory, the same result."""
    compile: bool = False
    """Compile the decoder, whose shapes are static. The encoder's depend on the masks and come from MinkowskiEngine's
    coordinate manager, which torch.compile cannot look into."""


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
    """auto takes CUDA where there is one; or cpu, cuda, cuda:1. Several processes take a GPU each."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints, besides the one at the end of each epoch; null: none besides."""
    keep_last: int = 3
    """How many of the newest checkpoints are kept, besides best.pt, that of the lowest held-out loss."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every_epochs: int = 1
    """Epochs between held-out losses."""
    picture_every_epochs: int = 1
    """Epochs between pictures."""


@dataclass
class Config:
    """A whole pretraining run: the sections of a YAML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: PretrainTrainConfig = field(default_factory=PretrainTrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


# Keys that change neither the weights a run arrives at nor the pictures of it: a resumed run may change them.
FREE_KEYS = frozenset(
    {
        "data.workers",
        "data.cache",
        "data.max_unreadable",
        "model.backend",
        "train.activation_checkpointing",
        "run.dir",
        "run.resume",
        "run.device",
        "run.checkpoint_every_steps",
        "run.keep_last",
        "run.log_every_steps",
        "run.evaluate_every_epochs",
        "run.picture_every_epochs",
    }
)
