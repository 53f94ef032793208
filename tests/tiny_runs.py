"""Tiny configurations, images and an encoder for tests of whole runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.ops import StochasticDepth

from spark_me import register_encoder
from spark_me.config.loading import to_yaml
from spark_me.config.tasks import AnyConfig, PretrainConfig
from spark_me.config.training import RunConfig
from spark_me.data.datasets import Batch
from spark_me.train import distributed
from spark_me.train.checkpoint import TrainState, checkpoint_of, list_checkpoints, read_checkpoint
from spark_me.train.logs import read_metrics
from spark_me.train.run_directory import RunDirectory
from spark_me.train.step import Stepper

CONFIG = """
model: {{encoder: {encoder}, backend: native, image_size: [{height}, 64], decoder_width: 32, drop_path: 0.1}}
data: {{root: {images}, held_out: 2, workers: {workers}}}
optim: {{name: adamw, base_lr: 0.05, warmup_epochs: 0}}
train: {{epochs: {epochs}, batch_size: {batch_size}}}
run: {{checkpoint_every_steps: 2, log_every_steps: 1, device: cpu, picture_every_epochs: 1000}}
"""


SMALL = "small"
"""For runs that are not about their encoder: a step takes milliseconds, and a checkpoint is written in as many."""
RESNET = "timm/test_resnet"
"""A ResNet of half a million weights: for tests to which stride 32 or four stages matter, but not the size."""


class SmallNetwork(nn.Module):
    """Three strided convolutions and a residual branch, with all that decides whether two runs are alike."""

    def __init__(self, in_channels: int = 3, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv4, self.bn4 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu())).relu()
        x = self.bn3(self.conv3(x)).relu()
        return (self.drop_path(self.bn4(self.conv4(x))) + x).relu()


register_encoder(SMALL, SmallNetwork)


def run_directory(folder: Path) -> RunDirectory:
    """That of a run of the default configuration."""
    return RunDirectory(PretrainConfig(run=RunConfig(dir=str(folder))))


def content_of(state: TrainState, config: AnyConfig, **options: Any) -> dict[str, Any]:
    """A checkpoint's content, of a run of this configuration."""
    return checkpoint_of(state, config=to_yaml(config), batch_size=config.train.batch_size, **options)


def take_step(stepper: Stepper, batches: Sequence[Batch]) -> dict[str, float]:
    """Take a step and wait for it, as at the end of an epoch."""
    prepared = stepper.prepare(batches)
    (targets,) = distributed.all_reduce(prepared.targets)
    taken = stepper.take(prepared, targets)
    own, norm = taken.values.read()
    (loss,) = distributed.all_reduce(own)
    stepper.require_finite(taken, loss, norm)
    return {"loss": loss, "gradient_norm": norm}


def write_images(folder: Path, number: int = 10) -> Path:
    """A folder of pictures of noise."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(number):
        noise = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index:02}.png")
    return folder


def write_config(
    path: Path,
    images: Path,
    *,
    encoder: str = "resnet18",
    epochs: int = 2,
    batch_size: int = 2,
    height: int = 32,
    workers: int = 0,
) -> Path:
    """A configuration of 8 // batch_size steps an epoch, for the ten images of `write_images`."""
    content = CONFIG.format(
        encoder=encoder, images=images, epochs=epochs, batch_size=batch_size, height=height, workers=workers
    )
    path.write_text(content)
    return path


def newest(run: Path) -> dict[str, Any]:
    """The content of a run's last checkpoint."""
    return read_checkpoint(list_checkpoints(run / "checkpoints")[-1])


def values(run: Path) -> list[dict]:
    """The metrics of every step, without those of the machine."""
    machine = {"images_per_second", "data_wait", "memory_gib"}
    entries = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in entry.items() if key not in machine} for entry in entries]


def assert_same_end(actual: Path, expected: Path) -> None:
    """Two runs arrived at bitwise the same weights, optimizer and curves."""
    one, other = newest(actual), newest(expected)
    assert one["step"] == other["step"]
    for part in ("model", "optimizer"):
        assert_equal(one[part], other[part], part)
    assert values(actual) == values(expected)


def assert_equal(actual: object, expected: object, place: str = "") -> None:
    """Bitwise equality of nested containers of tensors."""
    assert type(actual) is type(expected), place
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), place  # type: ignore[arg-type]
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), place  # type: ignore[call-overload]
        for key in expected:
            assert_equal(actual[key], expected[key], f"{place}.{key}")  # type: ignore[index]
    elif isinstance(expected, list):
        assert len(actual) == len(expected), place  # type: ignore[arg-type]
        for number, (one, other) in enumerate(zip(actual, expected)):  # type: ignore[call-overload]
            assert_equal(one, other, f"{place}[{number}]")
    else:
        assert actual == expected, place
