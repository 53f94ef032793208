"""The loss on held-out images: the same crops and masks every time."""

from collections.abc import Iterable

import torch

from spark_me.data.datasets import Batch
from spark_me.data.unreadable import UnreadableFiles
from spark_me.errors import UserError
from spark_me.masking import draw_visible_of_samples
from spark_me.spark import SparK

MASKS = 4
"""Masks an image is measured under, so that a few images still give a steady number."""


@torch.no_grad()
def held_out_loss(
    model: SparK,
    batches: Iterable[Batch],
    unreadable: UnreadableFiles,
    *,
    seed: int,
    device: torch.device,
    autocast: torch.autocast,
) -> float:
    """Mean loss over images and masks; the model is left in training mode, its statistics and all RNGs untouched.

    In evaluation mode norms use their running statistics: with those of the batch, an image's loss would depend on
    its neighbours, and the statistics would take in held-out images.

    Raises:
        UserError: if no held-out image is readable.
    """
    model.eval()
    total, images = 0.0, 0
    for batch in batches:
        unreadable.add(batch.unreadable)
        if not batch.indices:
            continue
        valid = None if batch.valid is None else batch.valid.to(device)
        for number in range(MASKS):
            visible = draw_visible_of_samples(seed, number, batch.indices, model.grid, model.mask_ratio, batch.valid)
            with autocast:
                loss = model(batch.images.to(device), visible.to(device), valid)
            total += loss.item() * len(batch.indices)
        images += len(batch.indices)
    model.train()
    if not images:
        raise UserError("none of the held-out images is readable (see unreadable.txt in run.dir): check data.val_root")
    return total / (images * MASKS)
