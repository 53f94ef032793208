"""Fine-tuning of a dense network as a classifier, as a task for the trainer. Needs no MinkowskiEngine."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spark_me.config_finetune import FinetuneConfig
from spark_me.data.class_folders import LabelledFiles
from spark_me.data.datasets import Batch
from spark_me.data.files import fingerprint
from spark_me.data.labelled import held_out_labelled
from spark_me.data.loaders import held_out_loader, labelled_train_loader
from spark_me.data.unreadable import UnreadableFiles
from spark_me.dense import build_network, classifier_of
from spark_me.devices import copy_to
from spark_me.errors import UserError
from spark_me.sync_batch_norm import convert_sync_batchnorm
from spark_me.train import distributed
from spark_me.train.accuracy import predict_all
from spark_me.train.checkpoint import FINETUNE
from spark_me.train.finetune_plots import plot_finetuning
from spark_me.train.layer_decay import LayerDecay
from spark_me.train.metrics import read_metrics
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import count_steps, count_steps_per_epoch
from spark_me.train.soft_targets import SoftTargets
from spark_me.train.task import Inputs, require_even_split
from spark_me.train.unreadable import note_unreadable


class Finetuning:
    """Classify (`Task` says what each member is)."""

    name = FINETUNE
    best_is_highest = True

    def __init__(self, config: FinetuneConfig, files: LabelledFiles, device: torch.device) -> None:
        """
        Raises:
            UserError: if the batch does not fit the number of images or of processes, or a package is missing.
        """
        self.config = config
        self.images = files
        self.device = device
        self.classes = files.classes
        self.files = len(files.train.paths) + len(files.val.paths)
        self.data_fingerprint = fingerprint(files.train.paths)
        self.steps_per_epoch = count_steps_per_epoch(len(files.train.paths), config)
        require_even_split(config.train.batch_size, distributed.world_size(), config.train.accumulate)
        self.model = _build_network(config, len(files.classes), device)
        self.ema = _average_of(self.model, config.train.ema)
        self.best_by = "held_out_top1" if self.ema is None else "held_out_ema_top1"
        self.targets = SoftTargets(config.train, len(files.classes))
        self.lr_scale = LayerDecay(self.model, config.optim.layer_decay).scale
        self.held_out = held_out_labelled(files.val, config)

    def batches(self, first_step: int, most_unreadable: int) -> Iterable[Batch]:
        return labelled_train_loader(
            self.images.train,
            self.config,
            first_step=first_step,
            steps=count_steps(self.config, self.steps_per_epoch),
            most_unreadable=most_unreadable,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            pin_memory=self.device.type == "cuda",
        )

    def image_names(self, indices: Sequence[int]) -> list[str]:
        paths = self.images.train.paths
        return [str(paths[index % len(paths)]) for index in indices]

    def inputs(self, batch: Batch, epoch: int) -> Inputs:
        assert batch.labels is not None
        return Inputs(self.targets.mix(batch.images, batch.labels), targets=len(batch.labels))

    def loss(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        images, targets = (copy_to(tensor, self.device) for tensor in tensors)
        return self.targets.loss(model(images), targets)

    def after_step(self) -> None:
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def evaluate(self, unreadable: UnreadableFiles, autocast: torch.autocast) -> dict[str, float]:
        """Loss, top-1 and top-5 on the validation images, of the weights and of their average."""
        batches = held_out_loader(
            self.held_out,
            self.config,
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
            images, loss, top1, top5 = distributed.total(*predictions.sums)
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


def _build_network(config: FinetuneConfig, classes: int, device: torch.device) -> nn.Module:
    torch.manual_seed(config.run.seed)
    model = config.model
    network = build_network(model.encoder, classes, model.in_channels, model.drop_path)
    if config.model.classifier_std is not None:
        classifier: Any = classifier_of(network)
        nn.init.normal_(classifier.weight, std=config.model.classifier_std)
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
