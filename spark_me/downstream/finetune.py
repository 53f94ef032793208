"""Fine-tuning of a dense network as a classifier: `spark-me finetune`. Needs no MinkowskiEngine."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from spark_me.config.tasks import FinetuneConfig, FinetuneModelConfig, FinetuneTrainConfig
from spark_me.data.class_folders import LabelledFiles, find_labelled
from spark_me.data.datasets import Batch
from spark_me.data.files import fingerprint
from spark_me.data.loaders import (
    held_out_loader,
    labelled_test_dataset,
    labelled_train_loader,
    labelled_train_reader,
)
from spark_me.data.sampler import Share
from spark_me.data.unreadable import UnreadableFiles
from spark_me.dense import build_network, classifier_of
from spark_me.devices import copy_to
from spark_me.downstream.evaluate import predict_all
from spark_me.downstream.layer_decay import LayerDecay
from spark_me.errors import UserError, printable
from spark_me.sync_batch_norm import convert_sync_batchnorm
from spark_me.train import distributed
from spark_me.train.checkpoint import BEST, FINETUNE
from spark_me.train.distributed import device_of_process, note_unreadable
from spark_me.train.logs import command_text, place_text, quoted, read_metrics, say_start, size_text
from spark_me.train.plots import HELD_OUT_COLOUR, TRAIN_COLOUR, save_figure, smooth
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import Schedule, count_steps_per_epoch
from spark_me.train.starting_weights import settle_images, start_from
from spark_me.train.step import Inputs, split_batch
from spark_me.train.trainer import Trainer


class SoftTargets:
    """The loss of `train.loss`, with label smoothing, MixUp (arXiv 1710.09412) and CutMix (1905.04899)."""

    def __init__(self, train: FinetuneTrainConfig, classes: int) -> None:
        """
        Args:
            train: with the loss, the smoothing and both alphas.
            classes: K.
        """
        self.classes = classes
        self.binary = train.loss == "bce"
        self.smoothing = train.label_smoothing
        mixings = [
            kind(alpha=alpha, num_classes=classes)
            for kind, alpha in ((v2.MixUp, train.mixup), (v2.CutMix, train.cutmix))
            if alpha
        ]
        self.mixing = v2.RandomChoice(mixings) if mixings else None

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and targets float32 [B, K] of a batch; draws from torch's default generator."""
        if self.mixing is None:
            return images, functional.one_hot(labels, self.classes).float()
        mixed, targets = self.mixing(images, labels)
        return mixed, targets.float()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over images of logits [B, K]; in the binary form, of the sum over classes, as in mmpretrain."""
        smooth = targets * (1 - self.smoothing) + self.smoothing / self.classes
        if self.binary:
            each = functional.binary_cross_entropy_with_logits(logits.float(), smooth, reduction="none")
            return each.sum(dim=1).mean()
        return functional.cross_entropy(logits.float(), smooth)


EMA_COLOUR = "tab:green"


def plot_finetuning(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses over the steps, and under them top-1 on the validation images."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    if train := _values(metrics, "loss"):
        steps, values = zip(*train)
        losses.plot(steps, smooth(values), color=TRAIN_COLOUR, label="training, on augmented images (running mean)")
    for prefix, name, colour in (("", "", HELD_OUT_COLOUR), ("ema_", ", averaged weights", EMA_COLOUR)):
        for axes, measure in ((losses, "loss"), (accuracies, "top1")):
            if held_out := _values(metrics, f"held_out_{prefix}{measure}"):
                axes.plot(*zip(*held_out), color=colour, marker=".", label=f"validation images{name}")
    losses.set(ylabel="loss", title="Fine-tuning")
    accuracies.set(xlabel="step", ylabel="top-1", ylim=(0, 1))
    for axes in (losses, accuracies):
        if axes.lines:
            axes.legend()
    save_figure(figure, path)


def _values(metrics: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in metrics if entry.get(name) is not None]


class Finetuning:
    """Classify (`Task` says what each member is)."""

    name = FINETUNE
    best_is_highest = True

    def __init__(self, config: FinetuneConfig, files: LabelledFiles, device: torch.device) -> None:
        """
        Raises:
            UserError: if the batch does not fit the number of images or of processes, or a package is missing.
        """
        data, train, seed = config.data, config.train, config.run.seed
        self.config = config
        self.images = files
        self.device = device
        self.classes = files.classes
        self.graph_obstacle = "fine-tuning takes its steps one by one"
        self.files = len(files.train.paths) + len(files.val.paths)
        self.data_fingerprint = fingerprint(files.train.paths)
        self.steps_per_epoch = count_steps_per_epoch(len(files.train.paths), data, train.batch_size)
        self.micro_batch = split_batch(train.batch_size, distributed.world_size(), train.accumulate)
        self.model = _build_network(config.model, len(files.classes), seed, device)
        self.ema = _average_of(self.model, train.ema)
        self.best_by = "held_out_top1" if self.ema is None else "held_out_ema_top1"
        self.targets = SoftTargets(train, len(files.classes))
        self.lr_scale = LayerDecay(self.model, config.optim.layer_decay).scale
        self.held_out = labelled_test_dataset(files.val, data, config.model.in_channels, seed)

    def batches(self, share: Share, most_unreadable: int) -> Iterable[Batch]:
        data = self.config.data
        reader = labelled_train_reader(data, self.config.model.in_channels, share.seed)
        pin_memory = self.device.type == "cuda"
        return labelled_train_loader(
            self.images.train, reader, data, share, most_unreadable=most_unreadable, pin_memory=pin_memory
        )

    def image_names(self, indices: Sequence[int]) -> list[str]:
        paths = self.images.train.paths
        return [str(paths[index % len(paths)]) for index in indices]

    def inputs(self, batch: Batch) -> Inputs:
        assert batch.labels is not None
        images, targets = self.targets.mix(batch.images, batch.labels)
        return Inputs((copy_to(images, self.device), copy_to(targets, self.device)), targets=len(batch.labels))

    def loss(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        images, targets = tensors
        return self.targets.loss(model(images), targets)

    def after_step(self) -> None:
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def evaluate(self, unreadable: UnreadableFiles, autocast: torch.autocast) -> dict[str, float]:
        """Loss, top-1 and top-5 on the validation images, of the weights and of their average."""
        batches = held_out_loader(
            self.held_out,
            self.micro_batch,
            self.config.data.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            pin_memory=self.device.type == "cuda",
        )
        networks = {"held_out_": self.model}
        if self.ema is not None:
            networks["held_out_ema_"] = self.ema.module
        own, records = predict_all(networks, batches, self.device, autocast)
        note_unreadable(unreadable, records)
        measured: dict[str, float] = {}
        for prefix, predictions in own.items():
            images, loss, top1, top5 = distributed.all_reduce(*predictions.sums)
            if not images:
                raise distributed.shared(
                    UserError("none of the validation images is readable (see unreadable.txt in run.dir): check them")
                )
            measured |= {f"{prefix}loss": loss / images, f"{prefix}top1": top1 / images, f"{prefix}top5": top5 / images}
        return measured

    def draw(self, run: RunDirectory, step: int) -> None:
        """Loss and accuracy over the steps."""
        plot_finetuning(read_metrics(run.metrics), run.loss_plot)

    def entries(self) -> dict[str, Any]:
        """Names of the classes and the average of the weights."""
        return {"classes": self.classes, "ema": None if self.ema is None else self.ema.module.state_dict()}

    def restore(self, content: dict[str, Any], path: Path) -> None:
        if content["classes"] != self.classes:
            raise UserError(
                f"{path}: was trained on {len(content['classes'])} other classes than the {len(self.classes)} in "
                "data.root: use its images, or choose another run.dir"
            )
        if self.ema is not None:
            if content["ema"] is None:
                raise UserError(f"{path}: has no average of the weights: set train.ema=null, as it was made with")
            self.ema.module.load_state_dict(content["ema"])
            self.ema.n_averaged.fill_(content["step"])


def _build_network(model: FinetuneModelConfig, classes: int, seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    network = build_network(model.encoder, classes, model.in_channels, model.drop_path)
    if model.classifier_std is not None:
        classifier: Any = classifier_of(network)
        nn.init.normal_(classifier.weight, std=model.classifier_std)
        nn.init.zeros_(classifier.bias)
    network.to(device)
    if distributed.world_size() > 1:
        convert_sync_batchnorm(network)
    return network


def _average_of(network: nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    # The first update copies the weights; norms' statistics are averaged like them.
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def say_beginning(task: Finetuning, run: RunDirectory, schedule: Schedule, start: str | None, steps: int) -> None:
    """What is trained on what, and from where, with so many steps done."""
    config, images = task.config, task.images
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    print(
        f"{config.model.encoder} ({parameters / 1e6:.2f} M parameters), {len(task.classes)} classes, "
        f"{config.data.train_crop}×{config.data.train_crop}, {config.train.precision} on {place_text(task.device)}"
    )
    print(
        f"{len(images.train.paths)} training images (× {config.data.repeats} crops an epoch), {len(images.val.paths)} "
        f"to validate on; {size_text(config.train, schedule, config.optim)}, layer decay {config.optim.layer_decay}"
    )
    say_start(start, run, steps, schedule.steps)


def say_end(task: Finetuning, run: RunDirectory) -> None:
    """The result, where to look and what to run next."""
    measured = [entry for entry in read_metrics(run.metrics) if task.best_by in entry]
    average = "" if task.ema is None else " of the averaged weights"
    if measured:
        last, best = measured[-1], max(measured, key=lambda entry: entry[task.best_by])
        print(
            f"top-1 {last[task.best_by]:.2%}{average} after the last step, "
            f"{best[task.best_by]:.2%} at best (step {best['step']})"
        )
    print(f"look at   {printable(str(run.loss_plot))}")
    print(f"curves    {command_text('tensorboard')} --logdir {quoted(run.tensorboard)}")
    weights, folder = quoted(run.checkpoints / BEST), quoted(run.path)
    print(f"next      {command_text('spark-me')} evaluate {quoted(run.config_file)} weights={weights} --out {folder}")
    print(f"or        {command_text('spark-me')} predict {weights} YOUR_PHOTO.jpg")


def finetune(config: FinetuneConfig) -> bool:
    """Run a configuration to its end, from the newest checkpoint of its directory if there is one.

    What it leaves open of the images is filled in, in place (`settle_images`).

    With several processes, call it in each, within `distributed.process_group()`.

    Returns:
        False if a signal asked to stop before the end.

    Raises:
        UserError: for anything in the configuration, the data, the weights or the directory that stands in the way.
        SystemExit: on processes besides the main one, in its place.
    """
    run = RunDirectory(config)
    with run.owned():
        return _finetune(config, run)


def _finetune(config: FinetuneConfig, run: RunDirectory) -> bool:
    settle_images(config.data, config.model.in_channels, config.weights, "weights=", run)
    with distributed.raise_together():
        if distributed.is_main():
            run.check()
        device = device_of_process(config.run.device)
        task = Finetuning(config, find_labelled(config.data, config.run.seed), device)
        trainer = Trainer(task, run, device)
    resumed_from = trainer.resume()
    start = resumed_from or start_from(config.weights, task.model, config.model)
    return trainer.run_to_end(partial(say_beginning, task), partial(say_end, task), start)
