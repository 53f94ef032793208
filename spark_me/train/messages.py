"""What a run prints at its beginning and at its end."""

import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from spark_me.config import AnyConfig, Config
from spark_me.data.files import Files
from spark_me.train import distributed
from spark_me.train.checkpoint import list_checkpoints
from spark_me.train.metrics import read_metrics
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import Schedule, describe_peak


def say_beginning(
    config: Config,
    model: nn.Module,
    files: Files,
    schedule: Schedule,
    device: torch.device,
    resumed_from: str | None,
    steps_done: int,
) -> None:
    """What is trained on what, and from where."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = config.model.image_size
    processes = distributed.world_size()
    where = str(device) if processes == 1 else f"{processes} processes ({device.type})"
    print(
        f"SparK {config.model.encoder} ({parameters / 1e6:.2f} M parameters with decoder), "
        f"{height}×{width}, {config.model.mask_ratio:.0%} hidden, {config.train.precision} on {where}"
    )
    print(
        f"{len(files.train)} training images (× {config.data.repeats} crops an epoch), {len(files.held_out)} held out; "
        f"{length_text(config, schedule)} of {batch_text(config, processes)}, {describe_peak(config)}"
    )
    if resumed_from is None:
        print(f"starting in {config.run.dir}")
    elif steps_done < schedule.steps:
        print(f"going on from {resumed_from}, {steps_done} steps done")
    else:
        print(f"this run is complete: {resumed_from} is its last step (for another, choose another run.dir)")


def say_stopped(config: AnyConfig, steps_done: int, checkpoint: Path) -> None:
    """How to go on with a run that was asked to stop before its end."""
    how = "" if config.run.resume == "auto" else " with run.resume=auto"
    print(f"stopped as asked, {steps_done} steps done and saved in {checkpoint}: repeat the command{how} to go on")


def say_end(run: RunDirectory) -> None:
    """The result, where to look and what to run next."""
    measured = [entry["held_out_loss"] for entry in read_metrics(run.metrics) if "held_out_loss" in entry]
    if measured:
        print(f"held-out loss {measured[-1]:.4f} (predicting nothing scores 1.0)")
    pictures = [str(path) for path in (run.picture, run.loss_plot) if path.is_file()]
    print(f"look at   {'  '.join(pictures)}")
    print(f"curves    {command_text('tensorboard')} --logdir {run.tensorboard}")
    reconstruct = f"reconstruct {list_checkpoints(run.checkpoints)[-1]} YOUR_PHOTO.jpg --out photo.png"
    print(f"try       {command_text('spark-me')} {reconstruct}")
    own = "pretrain configs/pretrain/small.yaml data.root=/path/to/images run.dir=runs/mine"
    print(f"next      {command_text('spark-me')} {own}")


def length_text(config: AnyConfig, schedule: Schedule) -> str:
    """How long a run is."""
    epochs = "" if config.train.epochs is None else f"{config.train.epochs} epochs, "
    return f"{epochs}{schedule.steps} steps"


def batch_text(config: AnyConfig, processes: int) -> str:
    """The batch, and how it is split if it is."""
    size, parts = config.train.batch_size, processes * config.train.accumulate
    return str(size) if parts == 1 else f"{size} ({processes} × {config.train.accumulate} × {size // parts})"


def command_text(name: str) -> str:
    """How to call a command of this environment from here, activated or not."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).with_name(name))
