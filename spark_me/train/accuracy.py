"""How well a classifier does on labelled images."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spark_me.data.datasets import Batch


class Predictions(NamedTuple):
    """What a network makes of N images."""

    labels: Tensor
    """int64 [N], the true classes."""
    predicted: Tensor
    """int64 [N], the classes of the highest logits."""
    in_top5: Tensor
    """bool [N], whether the true class is among the five highest logits."""
    losses: Tensor
    """float64 [N], cross-entropy with the true class."""

    @property
    def sums(self) -> tuple[float, float, float, float]:
        """Number of images, sum of their losses, and how many are right by top-1 and by top-5."""
        right, among = int((self.predicted == self.labels).sum()), int(self.in_top5.sum())
        return len(self.labels), self.losses.sum().item(), right, among


@torch.no_grad()
def predict_all(
    networks: Mapping[str, nn.Module], batches: Iterable[Batch], device: torch.device, autocast: torch.autocast
) -> tuple[dict[str, Predictions], list[tuple[str, str]]]:
    """Predict the classes of images by each network, in evaluation mode; they are left in the mode they were in.

    Returns:
        Predictions by the networks' names, and (path, reason) of images that were unreadable.
    """
    modes = {name: network.training for name, network in networks.items()}
    parts: dict[str, list[Predictions]] = {name: [] for name in networks}
    unreadable: list[tuple[str, str]] = []
    for network in networks.values():
        network.eval()
    for batch in batches:
        unreadable += batch.unreadable
        if batch.labels is None:
            continue
        images = batch.images.to(device)
        for name, network in networks.items():
            with autocast:
                logits = network(images)
            parts[name].append(_judge(logits.float().cpu(), batch.labels))
    for name, network in networks.items():
        network.train(modes[name])
    return {name: _joined(own) for name, own in parts.items()}, unreadable


def _judge(logits: Tensor, labels: Tensor) -> Predictions:
    highest = logits.topk(min(5, logits.shape[1])).indices
    losses = functional.cross_entropy(logits.double(), labels, reduction="none")
    return Predictions(labels, highest[:, 0], (highest == labels[:, None]).any(dim=1), losses)


def _joined(parts: list[Predictions]) -> Predictions:
    if not parts:
        empty = torch.empty(0, dtype=torch.int64)
        return Predictions(empty, empty, empty.bool(), empty.double())
    return Predictions(*(torch.cat(tensors) for tensors in zip(*parts)))
