"""What a run prints at its beginning and at its end."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

import spark_me
from spark_me.config import AnyConfig, Config
from spark_me.data.files import Files
from spark_me.errors import printable
from spark_me.train import distributed
from spark_me.train.checkpoint import BEST, list_checkpoints
from spark_me.train.metrics import read_metrics
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import Schedule, describe_peak
from spark_me.weights.layouts import layout_names


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
        print(f"starting in {printable(config.run.dir)}")
    elif steps_done < schedule.steps:
        print(f"going on from {printable(resumed_from)}, {steps_done} steps done")
    else:
        last = printable(resumed_from)
        print(f"this run is complete: {last} is its last step (for another, choose another run.dir)")


def say_stopped(config: AnyConfig, steps_done: int, checkpoint: Path) -> None:
    """How to go on with a run that was asked to stop before its end."""
    how = "" if config.run.resume == "auto" else " with run.resume=auto"
    where = printable(str(checkpoint))
    print(f"stopped as asked, {steps_done} steps done and saved in {where}: repeat the command{how} to go on")


def say_end(config: Config, run: RunDirectory) -> None:
    """The result, where to look and what to run next."""
    measured = [entry["held_out_loss"] for entry in read_metrics(run.metrics) if "held_out_loss" in entry]
    if measured:
        print(f"held-out loss {measured[-1]:.4f} (predicting nothing scores 1.0)")
    pictures = [str(path) for path in (run.picture, run.loss_plot) if path.is_file()]
    print(f"look at   {'  '.join(map(printable, pictures))}")
    print(f"curves    {command_text('tensorboard')} --logdir {quoted(run.tensorboard)}")
    best = run.checkpoints / BEST
    # A run that goes on from the last step of another one writes none.
    written = [*list_checkpoints(run.checkpoints), *([best] if best.is_file() else [])] or [Path(config.run.resume)]
    weights = quoted(written[-1])
    image = "YOUR_PHOTO.jpg" if config.model.in_channels in (1, 3) else "YOUR_IMAGE.npy"
    print(f"more      {command_text('spark-me')} reconstruct {weights} {image} --out photo.png")
    encoder = config.model.encoder
    layout, *_ = layout_names(encoder)
    file = encoder.replace("/", "_")
    print(f"weights   {command_text('spark-me')} convert {weights} {file}.safetensors --to {layout}")
    if config.data.kind == "demo":
        own = f"pretrain {configuration_text('pretrain')} data.root=/path/to/images run.dir=runs/mine"
        print(f"next      {command_text('spark-me')} {own}")
    else:
        channels = "" if config.model.in_channels == 3 else f" model.in_channels={config.model.in_channels}"
        own = f"finetune {configuration_text('finetune')} model.encoder={encoder}{channels} weights={weights}"
        print(f"next      {command_text('spark-me')} {own} data.root=/path/above/train/and/val run.dir=runs/tuned")


def length_text(config: AnyConfig, schedule: Schedule) -> str:
    """How long a run is."""
    epochs = "" if config.train.epochs is None else f"{config.train.epochs} epochs, "
    return f"{epochs}{schedule.steps} steps"


def batch_text(config: AnyConfig, processes: int) -> str:
    """The batch, and how it is split if it is."""
    size, parts = config.train.batch_size, processes * config.train.accumulate
    return str(size) if parts == 1 else f"{size} ({processes} × {config.train.accumulate} × {size // parts})"


def command_text(name: str) -> str:
    """How to call a command of this environment from here, activated or not; `spark-me` as it was called."""
    script = Path(sys.argv[0])
    if name == "spark-me" and script.suffix == ".py" and script.name != "__main__.py":  # one's own, with its encoder
        return f"{command_text('python')} {quoted(script)}"
    return name if shutil.which(name) else quoted(os.path.relpath(Path(sys.executable).with_name(name)))


def configuration_text(task: str) -> str:
    """Where the small configuration of a task lies, as seen from here."""
    path = Path(spark_me.__file__).parents[1] / "configs" / task / "small.yaml"
    return quoted(os.path.relpath(path)) if path.is_file() else f"configs/{task}/small.yaml"


def quoted(path: str | Path) -> str:
    """A path as a shell takes it, and a terminal shows it."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    # What bash and zsh write for such names.
    characters = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\{byte:03o}" for byte in os.fsencode(text)
    )
    return f"$'{''.join(characters)}'"
