"""Dense networks by name, with published weights, for use downstream. Needs torchvision."""

import difflib
import os
from typing import NamedTuple

from torch import Tensor, nn
from torchvision.models import resnet

from spark_me.encoders.registry import RESNETS, list_encoders
from spark_me.errors import UserError
from spark_me.weights.transfer import load_weights


class Published(NamedTuple):
    """Weights on the web; the file's name ends in the start of its SHA-256."""

    encoder: str
    num_classes: int | None
    url: str


_HOST = "https://download.openmmlab.com/mmpretrain/v1.0/spark"
_RESNET50 = f"{_HOST}/spark_sparse-resnet50_8xb512-amp-coslr-800e_in1k"
_CONVNEXTV2 = f"{_HOST}/spark_sparse-convnextv2-tiny_16xb256-amp-coslr-800e_in1k"
PUBLISHED = {
    "spark_sparse-resnet50_800e_in1k": Published(
        "resnet50", None, f"{_RESNET50}/spark_sparse-resnet50_8xb512-amp-coslr-800e_in1k_20230612-e403c28f.pth"
    ),
    "resnet50_spark-pre_300e_in1k": Published(
        "resnet50",
        1000,
        f"{_RESNET50}/resnet50_8xb256-coslr-300e_in1k/resnet50_8xb256-coslr-300e_in1k_20230612-f86aab51.pth",
    ),
    "spark_sparse-convnextv2-tiny_800e_in1k": Published(
        "convnextv2_tiny",
        None,
        f"{_CONVNEXTV2}/spark_sparse-convnextv2-tiny_16xb256-amp-coslr-800e_in1k_20230612-b0ea712e.pth",
    ),
    "convnextv2-tiny_spark-pre_300e_in1k": Published(
        "convnextv2_tiny",
        1000,
        f"{_CONVNEXTV2}/convnextv2-tiny_8xb256-coslr-300e_in1k/"
        "convnextv2-tiny_8xb256-coslr-300e_in1k_20230612-ffc78743.pth",
    ),
}


class DenseResNet(resnet.ResNet):
    """torchvision's ResNet of a name in `list_encoders()`, with its parameter names; the classifier is optional."""

    def __init__(self, encoder: str, num_classes: int | None = None, in_channels: int = 3) -> None:
        block, depths = RESNETS[encoder]
        super().__init__(getattr(resnet, block), list(depths), num_classes or 1)
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        if num_classes is None:
            del self.fc
        self.num_classes = num_classes

    def extract_feat(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [B, C, H, W], normalised as in training → maps [B, C_i, H/s_i, W/s_i] at strides 4, 8, 16, 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        first = self.layer1(x)
        second = self.layer2(first)
        third = self.layer3(second)
        return first, second, third, self.layer4(third)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]; without a classifier the deepest features, averaged: [B, C_4]."""
        pooled = self.avgpool(self.extract_feat(images)[-1]).flatten(1)
        return pooled if self.num_classes is None else self.fc(pooled)


def list_models() -> list[str]:
    """Names that `get_model` accepts: published weights, then plain encoders."""
    return [name for name, row in PUBLISHED.items() if row.encoder in RESNETS] + [
        n for n in list_encoders() if n in RESNETS
    ]


def get_model(name: str, pretrained: bool | str | os.PathLike[str] = False, *, in_channels: int = 3) -> DenseResNet:
    """A dense network for use downstream, with `extract_feat`.

    Its images are RGB, normalised by ImageNet's mean (123.675, 116.28, 103.53) and deviation (58.395, 57.12, 57.375) of
    values 0-255, as those of the published weights were.

    Args:
        name: one of `list_models()`. Fine-tuned names have a classifier of 1000 classes, the others none.
        pretrained: True downloads the published weights into torch.hub's cache and checks their SHA-256; a path or URL
            loads that file, of any known layout; False leaves the weights random.
        in_channels: channels of the images.

    Raises:
        UserError: for an unknown name, a name without published weights, or a file that cannot be loaded.
        WeightsError: if the file's tensors do not fit.
    """
    row = PUBLISHED.get(name, Published(name, None, ""))
    if row.encoder not in RESNETS:
        raise UserError(_unknown(name))
    if pretrained is True and not row.url:
        trained = ", ".join(key for key, other in PUBLISHED.items() if other.encoder == name)
        raise UserError(
            f"{name}: no weights were published by this name: give a path or URL, or choose {trained or 'another'}"
        )
    network = DenseResNet(row.encoder, row.num_classes, in_channels)
    if pretrained is not False:
        load_weights(network, row.url if pretrained is True else pretrained)
    return network


def _unknown(name: str) -> str:
    if name in PUBLISHED:
        return f"{name}: its encoder {PUBLISHED[name].encoder} is not in this version of spark_me"
    close = difflib.get_close_matches(name, list_models(), n=1)
    return f"unknown model {name!r}: " + (
        f"did you mean {close[0]}?" if close else f"choose one of {', '.join(list_models())}"
    )
