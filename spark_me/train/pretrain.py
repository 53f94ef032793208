"""SparK pretraining as a task for the trainer, and `spark-me pretrain`, which puts a run together."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spark_me.config.tasks import ModelConfig, PretrainConfig, PretrainTrainConfig
from spark_me.data.datasets import Batch
from spark_me.data.files import Files, find_files, fingerprint
from spark_me.data.loaders import held_out_dataset, held_out_loader, train_loader, train_reader
from spark_me.data.sampler import Share
from spark_me.data.shards import Shards
from spark_me.data.transforms import Normalise
from spark_me.data.unreadable import UnreadableFiles
from spark_me.devices import copy_to
from spark_me.errors import UserError, printable
from spark_me.masking import count_visible, draw_visible_of_samples
from spark_me.spark import SparK
from spark_me.sparse import VisiblePatches, convert_sync_batchnorm
from spark_me.train import distributed
from spark_me.train.algorithms import Algorithms
from spark_me.train.checkpoint import BEST, PRETRAIN, list_checkpoints
from spark_me.train.distributed import device_of_process, note_unreadable
from spark_me.train.logs import (
    command_text,
    configuration_text,
    place_text,
    quoted,
    read_metrics,
    say_start,
    size_text,
)
from spark_me.train.plots import plot_loss
from spark_me.train.reconstruct import draw_reconstruction, model_of, read_subjects
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import Schedule, count_steps_per_epoch
from spark_me.train.starting_weights import load_initial_weights
from spark_me.train.step import Inputs, split_batch
from spark_me.train.trainer import Trainer
from spark_me.weights.layouts import layout_names

MASKS = 4
"""Masks an image is measured under, so that a few images still give a steady number."""


class HeldOut(NamedTuple):
    """What one process measured on its share of the held-out images."""

    loss_sum: float
    """Over images, each under its mean over masks."""
    images: int
    unreadable: list[tuple[str, str]]
    """(path, reason) of files that were skipped."""


@torch.no_grad()
def measure_held_out(
    model: SparK, batches: Iterable[Batch], *, seed: int, device: torch.device, autocast: torch.autocast
) -> HeldOut:
    """Sum the loss over images; the model is left in training mode, its statistics and all RNGs untouched.

    In evaluation mode norms use their running statistics: with those of the batch, an image's loss would depend on
    its neighbours, and the statistics would take in held-out images.
    """
    model.eval()
    total, images = 0.0, 0
    unreadable: list[tuple[str, str]] = []
    for batch in batches:
        unreadable += batch.unreadable
        if not batch.indices:
            continue
        for number in range(MASKS):
            visible = draw_visible_of_samples(seed, number, batch.indices, model.grid, model.mask_ratio, batch.valid)
            with autocast:
                loss = model(copy_to(batch.images, device), visible, batch.valid)
            total += loss.item() * len(batch.indices)
        images += len(batch.indices)
    model.train()
    return HeldOut(total / MASKS, images, unreadable)


PICTURES = 6
"""Most rows of reconstruction.png."""


class Pretraining:
    """Reconstruct the hidden patches (`Task` says what each member is)."""

    name = PRETRAIN
    best_by = "held_out_loss"
    best_is_highest = False

    def __init__(self, config: PretrainConfig, files: Files, device: torch.device) -> None:
        """
        Raises:
            UserError: if the batch does not fit the number of images or of processes, or the mask not the images.
        """
        data, train, seed = config.data, config.train, config.run.seed
        self.config = config
        self.images = files
        self.device = device
        self.files = len(files.train) + len(files.held_out)
        self.graph_obstacle = graph_obstacle(config, device)
        self.data_fingerprint = fingerprint(files.train)
        self.steps_per_epoch = count_steps_per_epoch(len(files.train), data, train.batch_size)
        self.micro_batch = split_batch(train.batch_size, distributed.world_size(), train.accumulate)
        self.model = _build_model(config.model, train, seed, device)
        _require_two_values(self.model, train)
        self.normalise = Normalise(data, config.model.in_channels, device)
        self.algorithms = Algorithms(device, distributed.common_store())
        self.held_out = held_out_dataset(files.held_out, data, config.model, seed)

    def batches(self, share: Share, most_unreadable: int) -> Iterable[Batch]:
        data, model = self.config.data, self.config.model
        reader = train_reader(data, model, share.seed)
        pin_memory = self.device.type == "cuda"
        return train_loader(
            self.images.train, reader, data, share, most_unreadable=most_unreadable, pin_memory=pin_memory
        )

    def image_names(self, indices: Sequence[int]) -> list[str]:
        images = self.images.train
        return [] if isinstance(images, Shards) else [str(images[index % len(images)]) for index in indices]

    def inputs(self, batch: Batch) -> Inputs:
        images, visible, valid = self.normalise(copy_to(batch.images, self.device)), batch.visible, batch.valid
        assert visible is not None
        patches = VisiblePatches.of(visible, self.device)
        if valid is None:
            return Inputs((images, *patches), targets=int((~visible).sum()))
        return Inputs((images, *patches, copy_to(valid, self.device)), targets=int((valid & ~visible).sum()))

    def loss(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        images, visible, places, numbers, *valid = tensors
        return model(images, VisiblePatches(visible, places, numbers), *valid)

    def lr_scale(self, name: str) -> float:
        return 1.0

    def after_step(self) -> None:
        """The optimizer has changed all there is."""

    def evaluate(self, unreadable: UnreadableFiles, autocast: torch.autocast) -> dict[str, float]:
        """The held-out loss; every process measures its share of the images."""
        if not self.images.held_out:
            return {}
        batches = held_out_loader(
            self.held_out,
            self.micro_batch,
            self.config.data.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            pin_memory=self.device.type == "cuda",
        )
        own = measure_held_out(self.model, batches, seed=self.config.run.seed, device=self.device, autocast=autocast)
        note_unreadable(unreadable, own.unreadable)
        loss_sum, images = distributed.all_reduce(own.loss_sum, own.images)
        if not images:
            raise distributed.shared(
                UserError(
                    "none of the held-out images is readable (see unreadable.txt in run.dir): check data.val_root"
                )
            )
        return {"held_out_loss": loss_sum / images}

    def draw(self, run: RunDirectory, step: int) -> None:
        """The loss over the steps, and what the model makes of the first held-out images."""
        plot_loss(read_metrics(run.metrics), run.loss_plot)
        subjects, _ = read_subjects(self.held_out, min(PICTURES, len(self.held_out)))
        if subjects:
            seed = self.config.run.seed
            encoder, data = self.config.model.encoder, self.config.data
            draw_reconstruction(self.model, subjects, data, run.picture, encoder=encoder, step=step, seed=seed)

    def entries(self) -> dict[str, Any]:
        return {"algorithms": self.algorithms.entry()}

    def restore(self, content: dict[str, Any], path: Path) -> None:
        self.algorithms.restore(content.get("algorithms"))


def graph_obstacle(config: PretrainConfig, device: torch.device) -> str:
    """Why no CUDA graph can hold a run's steps; empty where one can."""
    obstacles = {
        "a CPU takes none": device.type != "cuda",
        "train.cuda_graph=never": config.train.cuda_graph == "never",
        "several processes exchange gradients": distributed.world_size() > 1,
        "data.nodata: batches have different numbers of patches": config.data.nodata is not None,
        "train.precision=fp16: the host reads what its scaler found": config.train.precision == "fp16",
        "train.activation_checkpointing keeps the state of random numbers": config.train.activation_checkpointing,
        "model.backend=minkowski: the engine waits for the GPU": config.model.backend == "minkowski",
    }
    return next((what for what, stands in obstacles.items() if stands), "")


def _require_two_values(model: SparK, train: PretrainTrainConfig) -> None:
    visible = train.batch_size // train.accumulate * count_visible(model.grid, model.mask_ratio)
    if visible < 2 and any(isinstance(module, nn.BatchNorm2d) for module in model.encoder.modules()):
        raise UserError(
            f"train.batch_size={train.batch_size}: a batch has one visible patch, and the norms of the deepest "
            "scale need two values: raise train.batch_size or model.image_size"
        )


def _build_model(config: ModelConfig, train: PretrainTrainConfig, seed: int, device: torch.device) -> SparK:
    torch.manual_seed(seed)
    model = model_of(config).to(device)
    model.encoder.checkpointing = train.activation_checkpointing
    if distributed.world_size() > 1:
        convert_sync_batchnorm(model)
    if train.compile:
        model.decoder.compile(dynamic=False)
    return model


def say_beginning(task: Pretraining, run: RunDirectory, schedule: Schedule, start: str | None, steps: int) -> None:
    """What is trained on what, and from where, with so many steps done."""
    config, images = task.config, task.images
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    height, width = config.model.image_size
    print(
        f"SparK {config.model.encoder} ({parameters / 1e6:.2f} M parameters with decoder), "
        f"{height}×{width}, {config.model.mask_ratio:.0%} hidden, {config.train.precision} on {place_text(task.device)}"
    )
    print(
        f"{len(images.train)} training images (× {config.data.repeats} crops an epoch), "
        f"{len(images.held_out)} held out; {size_text(config.train, schedule, config.optim)}"
    )
    if task.device.type == "cuda":
        print(f"no CUDA graph: {task.graph_obstacle}" if task.graph_obstacle else "steps go into a CUDA graph")
    say_start(start, run, steps, schedule.steps)


def say_end(task: Pretraining, run: RunDirectory) -> None:
    """The result, where to look and what to run next."""
    measured = [entry["held_out_loss"] for entry in read_metrics(run.metrics) if "held_out_loss" in entry]
    if measured:
        print(f"held-out loss {measured[-1]:.4f} (predicting nothing scores 1.0)")
    pictures = [str(path) for path in (run.picture, run.loss_plot) if path.is_file()]
    print(f"look at   {'  '.join(map(printable, pictures))}")
    print(f"curves    {command_text('tensorboard')} --logdir {quoted(run.tensorboard)}")
    model, command = task.config.model, command_text("spark-me")
    best = run.checkpoints / BEST
    # A run that goes on from the last step of another one writes none.
    written = [*list_checkpoints(run.checkpoints), *([best] if best.is_file() else [])]
    weights = quoted((written or [Path(task.config.run.resume)])[-1])
    image = "YOUR_PHOTO.jpg" if model.in_channels in (1, 3) else "YOUR_IMAGE.npy"
    print(f"more      {command} reconstruct {weights} {image} --out photo.png")
    layout, *_ = layout_names(model.encoder)
    file = model.encoder.replace("/", "_")
    print(f"weights   {command} convert {weights} {file}.safetensors --to {layout}")
    if task.config.data.kind == "demo":
        own = f"pretrain {configuration_text('pretrain')} data.root=/path/to/images run.dir=runs/mine"
    else:
        channels = "" if model.in_channels == 3 else f" model.in_channels={model.in_channels}"
        own = (
            f"finetune {configuration_text('finetune')} model.encoder={model.encoder}{channels} weights={weights} "
            "data.root=/path/above/train/and/val run.dir=runs/tuned"
        )
    print(f"next      {command} {own}")


def pretrain(config: PretrainConfig) -> None:
    """Run a configuration to its end, from the newest checkpoint of its directory if there is one.

    With several processes, call it in each, within `distributed.process_group()`.

    Raises:
        UserError: for anything in the configuration, the data or the directory that stands in the way.
        SystemExit: on processes besides the main one, in its place.
    """
    run = RunDirectory(config)
    with run.owned():
        _pretrain(config, run)


def _pretrain(config: PretrainConfig, run: RunDirectory) -> None:
    with distributed.raise_together():
        if distributed.is_main():
            run.check()
        device = device_of_process(config.run.device)
        files = find_files(config.data, config.model.in_channels)
        task = Pretraining(config, files, device)
        trainer = Trainer(task, run, device)
    resumed_from = trainer.resume()
    if resumed_from is None and config.model.init_from is not None:
        load_initial_weights(config.model.init_from, task.model, run)
    with task.algorithms.used():
        trainer.run_to_end(partial(say_beginning, task), partial(say_end, task), resumed_from)
