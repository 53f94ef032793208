"""Files of classifiers with random weights, and images; shared by the tests of `spark_me.downstream`."""

from pathlib import Path

import numpy as np
import torch
import torchvision
import yaml
from checkpoints import random_like
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def save_image(path: Path, seed: int, shape: tuple[int, int] = (70, 90)) -> Path:
    """Random 8×8 colours, enlarged: noise, but with edges that a wrong resampling shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize(shape[::-1], Image.Resampling.NEAREST).save(path)
    return path


def torchvision_resnet(classes: int = 1000, seed: int = 0) -> nn.Module:
    network = torchvision.models.resnet18(num_classes=classes)
    network.load_state_dict(random_like(network.state_dict(), seed))
    return network.eval()


def by_hand(path: Path, resize: int = 236, crop: int = 224) -> Tensor:
    """What a torchvision user writes: [1, 3, crop, crop]."""
    pipeline = transforms.Compose(
        [
            transforms.Resize(resize, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return pipeline(Image.open(path).convert("RGB"))[None]


def fine_tuned(path: Path, classes: list[str], *, ema: nn.Module | None, **data: object) -> nn.Module:
    """Save a fine-tuning checkpoint of a ResNet-18; returns the network whose weights are not averaged."""
    network = torchvision_resnet(len(classes), seed=1)
    settings = {"test_resize": 50, "test_crop": 40, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    content = {
        "format": "spark_me.finetune",
        "format_version": 1,
        "config": yaml.safe_dump(
            {"model": {"encoder": "resnet18", "in_channels": 3}, "data": {**settings, "root": "x", **data}}
        ),
        "classes": classes,
        "model": network.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "step": 7,
    }
    torch.save(content, path)
    return network
