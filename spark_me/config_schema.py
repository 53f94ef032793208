"""What a configuration may hold: every key with its type, default and meaning."""

from dataclasses import dataclass, field

from spark_me.config_data import DataConfig


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
    decoder_width: int = 512
    """Channels at the decoder's entry, halved by each of its blocks: a multiple of the encoder's total stride. Fewer
    are cheaper. Example: 256."""
    drop_path: float | None = None
    """Stochastic depth of the last block, the largest; null takes the encoder's default. Example: 0.1."""
    init: str = "official"
    """Initial weights as in the paper's own code (official) or in mmpretrain: the decoder's convolutions differ, and
    zero_init_residual. Example: mmpretrain."""
    zero_init_residual: bool | None = None
    """Start ResNets' residual branches at zero; null: as model.init does, official at zero, mmpretrain not. In a run of
    a few thousand steps from zero they open too little to be of use: there, false. Example: false."""
    init_from: str | None = None
    """Weights to start from: a published name, a path or URL of any known layout, whole model or encoder alone. null:
    random. Not read again by a run that goes on from its own checkpoint. Example: spark_sparse-resnet50_800e_in1k."""


@dataclass
class LambConfig:
    """What timm's LAMB leaves open; for optim.name=lamb."""

    max_grad_norm: float | None = None
    """Largest norm of the gradient inside LAMB, after optim.clip_norm; null does not clip there. Example: 1.0."""
    bias_correction: bool = True
    """Correct the averages of the gradient and its square for their start at zero."""
    always_adapt: bool = False
    """Scale the steps of parameters without weight decay, too, by the norm of their weights over that of their step."""


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "lamb"
    """lamb or adamw. Example: adamw."""
    base_lr: float = 2e-4
    """Peak learning rate for 256 images a batch; the run's peak is base_lr · batch_size / 256.
    Example: 1e-3."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the averages of the gradient and of its square."""
    weight_decay: float = 0.04
    """Weight decay of the first step; none on norms, biases, other vectors and mask tokens."""
    weight_decay_end: float = 0.2
    """Weight decay of the last step, which a cosine leads to."""
    warmup_epochs: float | None = 40
    """Epochs of linear warm-up, whole or not; null where warmup_share says it instead, as it must with train.steps."""
    warmup_share: float | None = None
    """Linear warm-up as a share of the run in [0, 1]; null where warmup_epochs says it instead. Example: 0.05."""
    warmup_start_factor: float = 0.005
    """Where the warm-up starts, as a share of the peak learning rate."""
    end_factor: float = 0.001
    """Learning rate of the last step, which a cosine leads to, as a share of the peak."""
    clip_norm: float | None = 5.0
    """Largest norm of the gradient, to which a larger one is scaled down; null does not clip. Example: 1.0."""
    lamb: LambConfig = field(default_factory=LambConfig)


@dataclass
class TrainConfig:
    """How long and in what portions, for any task."""

    epochs: int | None = 1600
    """Length of the run in passes over the images; null where train.steps says it instead. Example: 100."""
    steps: int | None = None
    """Length of the run in steps; null where train.epochs says it instead. Example: 20000."""
    batch_size: int = 4096
    """Images in a step, over all processes together and all their micro-batches. Example: 256."""
    accumulate: int = 1
    """Micro-batches whose gradients make one step: a process has batch_size / (processes · accumulate) images at once.
    Loss and gradient are the whole batch's; batch norms see one micro-batch at a time, as they must.
    Example: 4."""
    precision: str = "fp32"
    """fp32; tf32 for its products (CUDA only); bf16 or fp16 (with a scaled loss) by autocast, weights in float32.
    Example: bf16."""


@dataclass
class PretrainTrainConfig(TrainConfig):
    """How long, in what portions, and how it is computed."""

    activation_checkpointing: bool = False
    """Compute the activations inside encoder blocks twice instead of keeping them: less memory, the same result."""
    compile: bool = False
    """Compile the decoder, whose shapes are static. The encoder's depend on the masks and come from MinkowskiEngine's
    coordinate manager, which torch.compile cannot look into."""


@dataclass
class RunConfig:
    """Where the run lives and what it writes."""

    dir: str = "runs/pretrain"
    """Everything the run writes goes here; a directory belongs to one configuration. Example: runs/mine."""
    resume: str = "auto"
    """auto goes on from the newest checkpoint in run.dir, if any; never refuses to start if there is one; or the path
    of a checkpoint. Example: runs/mine/checkpoints/step_00001000.pt."""
    seed: int = 0
    """Decides all that is drawn: initial weights, order of images, crops, masks. Example: 1."""
    device: str = "auto"
    """auto takes CUDA where there is one; or cpu, cuda, cuda:1. Several processes take a GPU each. Example: cpu."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints, besides the one at the end of each epoch; null: none besides. A run that is killed
    loses the steps since the last. Example: 500."""
    keep_last: int = 3
    """How many of the newest checkpoints are kept, besides best.pt, that of the lowest held-out loss, or of the
    highest top-1 in fine-tuning."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    print_every_steps: int = 50
    """Steps between lines on the screen where that is no terminal, which has a bar instead. Example: 10."""
    evaluate_every_epochs: int = 1
    """Epochs between measurements on the held-out images, which the end of the run has anyway. Example: 10."""
    picture_every_epochs: int = 1
    """Epochs between drawings of the run's pictures (loss.png and others), which its end has anyway. Example: 10."""


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
        "data.allow_pipe",
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
        "run.print_every_steps",
        "run.evaluate_every_epochs",
        "run.picture_every_epochs",
    }
)
