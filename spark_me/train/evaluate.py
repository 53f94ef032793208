"""The loss on held-out images: the same crops and masks every time."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from spark_me.data.datasets import Batch
from spark_me.devices import copy_to
from spark_me.masking import draw_visible_of_samples
from spark_me.spark import SparK

MASKS = 4
"""Masks an image is measured under, so that a few images still give a steady number."""


class HeldOut(NamedTuple):
    """What one process measured on its share of the held-out images."""

    loss_sum: float
    """Over images, each under its mean over masks."""
    images: int
    unreadable: list[tuple[str, str]]
    """(path, reason) of files that were skipped."""


@torch.no_grad()
def measure_held_out(
    model: SparK, batches: Iterable[Batch], *, seed: int, device: torch.device, autocast: torch.autocast
) -> HeldOut:
    """Sum the loss over images; the model is left in training mode, its statistics and all RNGs untouched.

    In evaluation mode norms use their running statistics: with those of the batch, an image's loss would depend on
    its neighbours, and the statistics would take in held-out images.
    """
    model.eval()
    total, images = 0.0, 0
    unreadable: list[tuple[str, str]] = []
    for batch in batches:
        unreadable += batch.unreadable
        if not batch.indices:
            continue
        for number in range(MASKS):
            visible = draw_visible_of_samples(seed, number, batch.indices, model.grid, model.mask_ratio, batch.valid)
            with autocast:
                loss = model(copy_to(batch.images, device), visible, batch.valid)
            total += loss.item() * len(batch.indices)
        images += len(batch.indices)
    model.train()
    return HeldOut(total / MASKS, images, unreadable)
