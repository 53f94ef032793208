"""Dense networks by name, with published weights, for use downstream. Needs torchvision; ConvNeXt V2 needs timm."""

import difflib
import os
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from spark_me.dense import build_network
from spark_me.errors import UserError
from spark_me.networks import TIMM, list_encoders, require_known
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


def list_models() -> list[str]:
    """Names of published weights, then of plain encoders; `get_model` takes torchvision's and timm's others, too."""
    return [*PUBLISHED, *list_encoders()]


def get_model(name: str, pretrained: bool | str | os.PathLike[str] = False, *, in_channels: int = 3) -> nn.Module:
    """A dense network for use downstream, with `extract_feat`: torchvision's, for ConvNeXt V2 timm's.

    It is in evaluation mode. For training call `network.train()`: batch norms then take the statistics of the batch,
    and update their own.
    Its images are RGB, normalised by ImageNet's mean (123.675, 116.28, 103.53) and deviation (58.395, 57.12, 57.375) of
    values 0-255, as those of the published weights were.

    Args:
        name: one of `list_models()`, or another of torchvision or `timm/NAME`. Fine-tuned names have a classifier of
            1000 classes, the others none.
        pretrained: True downloads the published weights into torch.hub's cache and checks their SHA-256; a path or URL
            loads that file, of any known layout; False leaves the weights random.
        in_channels: channels of the images.

    Raises:
        UserError: for an unknown name, a name without published weights, a file that cannot be loaded, or if timm is
            missing where it is needed.
        WeightsError: if the file's tensors do not fit.
    """
    if name not in PUBLISHED:
        _require_known(name)
    row = PUBLISHED.get(name, Published(name, None, ""))
    if pretrained is True and not row.url:
        trained = ", ".join(key for key, other in PUBLISHED.items() if other.encoder == name)
        raise UserError(
            f"{name}: no weights were published by this name: give a path or URL, or choose {trained or 'another'}"
        )
    network = build_network(row.encoder, row.num_classes, in_channels)
    if pretrained is not False:
        load_weights(network, row.url if pretrained is True else pretrained)
    return network.eval()


def _require_known(name: str) -> None:
    try:
        require_known(name)
    except UserError:
        if name.startswith(TIMM):
            raise
        raise UserError(f"unknown model {name!r}: {nearest(name, list_models())}") from None


def nearest(name: str, names: Sequence[str]) -> str:
    """What to do about an unknown name."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}"
