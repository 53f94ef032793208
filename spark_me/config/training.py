"""The sections `optim`, `train` and `run`, as every task has them: keys with type, default, meaning and range."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from spark_me.config.data import Rule

OPTIMIZERS = ("lamb", "adamw")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


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
    base_lr: float | None = 2e-4
    """Peak learning rate for 256 images a batch; the run's peak is base_lr · batch_size / 256. null where lr says it.
    Example: 1e-3."""
    lr: float | None = None
    """The run's peak learning rate itself, whatever the batch; null where base_lr says it. Example: 3e-4."""
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

    def rules(self) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        yield "optim.name", self.name in OPTIMIZERS, f"must be one of {', '.join(OPTIMIZERS)}"
        yield "optim.base_lr", self.base_lr is not None or self.lr is not None, "must be given, or optim.lr"
        yield "optim.base_lr", self.base_lr is None or self.base_lr > 0, "must be positive"
        yield "optim.lr", self.base_lr is None or self.lr is None, "must be null, or add optim.base_lr=null"
        yield "optim.lr", self.lr is None or self.lr > 0, "must be positive"
        yield "optim.betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "must be two in [0, 1)"
        yield "optim.weight_decay", self.weight_decay >= 0, "must not be negative"
        yield "optim.weight_decay_end", self.weight_decay_end >= 0, "must not be negative"
        yield "optim.warmup_start_factor", 0 <= self.warmup_start_factor <= 1, "must be a share of the peak in [0, 1]"
        yield "optim.end_factor", 0 <= self.end_factor <= 1, "must be a share of the peak in [0, 1]"
        yield "optim.clip_norm", self.clip_norm is None or self.clip_norm > 0, "must be null or positive"
        largest = self.lamb.max_grad_norm
        yield "optim.lamb.max_grad_norm", largest is None or largest > 0, "must be null or positive"


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
    CPUs without AVX-512 compute bf16 in float32. Example: bf16."""

    def rules(self) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        epochs, steps = self.epochs, self.steps
        yield "train.epochs", epochs is not None or steps is not None, "must be given, or train.steps"
        yield "train.steps", epochs is None or steps is None, "must be null, or add train.epochs=null"
        yield "train.epochs", epochs is None or epochs >= 1, "must be at least 1"
        yield "train.steps", steps is None or steps >= 1, "must be at least 1"
        yield "train.batch_size", self.batch_size >= 1, "must be at least 1"
        yield "train.accumulate", self.accumulate >= 1, "must be at least 1"
        yield "train.precision", self.precision in PRECISIONS, f"must be one of {', '.join(PRECISIONS)}"


def warmup_rules(optim: OptimConfig, train: TrainConfig) -> Iterator[Rule]:
    """Whether the warm-up is said once, and fits into the run."""
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

    def rules(self) -> Iterator[Rule]:
        """Every range check, in the order of the keys."""
        yield "run.dir", bool(self.dir), "must name a directory"
        yield "run.resume", bool(self.resume), "must be auto, never or a checkpoint's path"
        yield "run.seed", 0 <= self.seed < 2**63, "must not be negative"
        every = self.checkpoint_every_steps
        yield "run.checkpoint_every_steps", every is None or every >= 1, "must be null or at least 1"
        yield "run.keep_last", self.keep_last >= 1, "must be at least 1"
        yield "run.log_every_steps", self.log_every_steps >= 1, "must be at least 1"
        yield "run.print_every_steps", self.print_every_steps >= 1, "must be at least 1"
        yield "run.evaluate_every_epochs", self.evaluate_every_epochs >= 1, "must be at least 1"
        yield "run.picture_every_epochs", self.picture_every_epochs >= 1, "must be at least 1"
