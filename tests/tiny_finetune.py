"""Tiny labelled images and configurations for tests of whole fine-tuning runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_runs import RESNET

from spark_me.config.loading import load_config
from spark_me.config.tasks import FinetuneConfig

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}
CONFIG = """
weights: none
model: {{encoder: {encoder}, drop_path: 0.1}}
data: {{root: {root}, train_crop: 32, test_resize: 36, test_crop: 32, workers: 0}}
optim: {{base_lr: 0.02, warmup_epochs: 0.5, layer_decay: 0.7}}
train: {{epochs: 2, batch_size: 4, label_smoothing: 0.1, mixup: 0.8, cutmix: 1.0}}
run: {{dir: {run}, log_every_steps: 1, device: cpu}}
"""


def write_classes(root: Path, train: int = 4, val: int = 2, classes: Sequence[str] = tuple(COLOURS)) -> Path:
    """root/train and root/val with a folder a class, of pictures in the class's colour with noise."""
    generator = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                noise = generator.integers(-30, 31, (40, 48, 3)) + np.asarray(COLOURS.get(name, (90, 90, 90)))
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def write_config(folder: Path, encoder: str = RESNET) -> Path:
    """A configuration for the images of `write_classes` in folder/images: 3 steps an epoch."""
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(encoder=encoder, root=folder / "images", run=folder / "run"))
    return path


def tiny_config(folder: Path, *overrides: str) -> FinetuneConfig:
    """The same, loaded."""
    return load_config(write_config(folder), overrides, schema=FinetuneConfig)
