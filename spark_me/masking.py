"""Which patches are visible: drawing masks, bringing them to another resolution, cutting images into patches.

The only mask in spark_me is `visible`, bool `[B, fh, fw]`: True is kept, False is hidden.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spark_me.errors import UserError

MIN_VALID = 2
"""Patches with data that an image needs: one to be visible, one to be reconstructed."""


def count_visible(grid: tuple[int, int], mask_ratio: float) -> int:
    """Number of patches that stay visible in every image: round(fh·fw·(1 − ratio)), 20 of 49 at 0.6.

    Raises:
        UserError: if no patch would stay visible, or none would be hidden.
    """
    patches = grid[0] * grid[1]
    kept = round(patches * (1 - mask_ratio))
    if not 0 < kept < patches:
        problem = "leaves no patch visible" if kept <= 0 else "hides no patch"
        raise UserError(
            f"model.mask_ratio={mask_ratio} {problem} of the {grid[0]}×{grid[1]} grid: "
            f"choose a ratio between {0.5 / patches:.3f} and {1 - 0.5 / patches:.3f}, or a larger image"
        )
    return kept


def draw_visible(
    batch_size: int,
    grid: tuple[int, int],
    mask_ratio: float,
    *,
    valid: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw uniformly which patches of each image stay visible (paper, section 3.1).

    Args:
        batch_size: B.
        grid: (fh, fw), the number of patches down and across.
        mask_ratio: share of patches to hide, in (0, 1).
        valid: bool [B, fh, fw] on the generator's device, the patches to draw from; all when None.
        generator: source of randomness; torch's default one of the CPU when None.

    Returns:
        bool [B, fh, fw] on the generator's device, True = visible; round(patches·(1 − ratio)) in every image. Of
        n < fh·fw valid patches at least 1 and at most n − 1 are visible.

    Raises:
        ValueError: if an image has fewer than two valid patches.
    """
    kept: int | Tensor = count_visible(grid, mask_ratio)
    draw_device = generator.device if generator is not None else "cpu"
    # Sorting noise gives every subset of `kept` patches the same chance.
    noise = torch.rand(batch_size, grid[0] * grid[1], generator=generator, device=draw_device)
    if valid is not None:
        kept = _count_visible_of_valid(valid, mask_ratio)
        noise = noise.masked_fill(~valid.flatten(1), 2)  # behind all others
    place = noise.argsort(dim=1).argsort(dim=1)
    return (place < kept).view(batch_size, *grid)


def _count_visible_of_valid(valid: Tensor, mask_ratio: float) -> Tensor:
    patches = valid.flatten(1).sum(dim=1, keepdim=True)
    if (patches < MIN_VALID).any():  # no image: none has too few
        raise ValueError(f"every image needs {MIN_VALID} valid patches: one to be visible, one to be reconstructed")
    return (patches.double() * (1 - mask_ratio)).round().clamp(min=1).minimum(patches - 1)


def draw_visible_of_samples(
    seed: int,
    epoch: int,
    samples: Sequence[int],
    grid: tuple[int, int],
    mask_ratio: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Draw masks that depend on (seed, epoch, sample index) alone, so that any batching repeats them.

    Args:
        seed: the run's seed.
        epoch: the epoch; a sample's mask changes with it.
        samples: B indices of samples in the dataset.
        grid: (fh, fw).
        mask_ratio: share of patches to hide.
        valid: bool [B, fh, fw] on the CPU, the patches to draw from; all when None.

    Returns:
        bool [B, fh, fw], on the CPU.
    """
    masks = []
    for place, sample in enumerate(samples):
        # SeedSequence mixes the three numbers so that neighbouring samples are unrelated.
        state = np.random.SeedSequence([seed, epoch, int(sample)]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) & (2**63 - 1))
        of_sample = None if valid is None else valid[place : place + 1]
        masks.append(draw_visible(1, grid, mask_ratio, valid=of_sample, generator=generator))
    return torch.cat(masks)


def upsample_visible(visible: Tensor, factor: int) -> Tensor:
    """Repeat every patch's flag over factor × factor sites: [B, fh, fw] → bool [B, fh·factor, fw·factor]."""
    return visible.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [B, C, H, W] into patches [B, fh·fw, P·P·C], row-major; the channel varies fastest.

    Raises:
        UserError: if H or W is no multiple of P.
    """
    grid_of(images.shape[-2:], patch_size)
    blocks = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # B C fh fw P P
    return blocks.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of `patchify`: [B, fh·fw, P·P·C] → [B, C, fh·P, fw·P]."""
    blocks = patches.unflatten(1, grid).unflatten(3, (patch_size, patch_size, -1))  # B fh fw P P C
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def grid_of(image_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """The grid (fh, fw) of an image of (H, W) pixels.

    Raises:
        UserError: if H or W is no positive multiple of the patch size.
    """
    height, width = image_size
    if height <= 0 or width <= 0 or height % patch_size or width % patch_size:
        raise UserError(
            f"image size {height}×{width} is no multiple of the encoder's patch size {patch_size}: "
            f"the nearest that fits is {_nearest(height, patch_size)}×{_nearest(width, patch_size)}"
        )
    return height // patch_size, width // patch_size


def _nearest(length: int, patch_size: int) -> int:
    return max(1, round(length / patch_size)) * patch_size
