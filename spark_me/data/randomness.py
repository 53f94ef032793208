"""Random generators that depend on what is drawn alone: never on workers, batches or an earlier draw."""

import numpy as np
import torch

# What is drawn; keeps streams of the same (seed, epoch, sample) apart. Masks have their own: `draw_visible_of_samples`.
ORDER = 1
CROP = 2
SHUFFLE = 3
STEP = 4
"""Whatever a training step draws from torch's default generators, for example which branches are dropped."""
SUBSET = 5
"""Which images of a class are used."""


def seed_of(purpose: int, seed: int, epoch: int, sample: int = 0) -> int:
    """An integer below 2⁶³ mixed from the four numbers, so that neighbouring ones are unrelated."""
    # The purpose goes into the spawn key because a SeedSequence takes [a, b] and [a, b, 0] for the same.
    sequence = np.random.SeedSequence([seed, epoch, sample], spawn_key=(purpose,))
    return int(sequence.generate_state(1, np.uint64)[0]) & (2**63 - 1)


def generator_of(purpose: int, seed: int, epoch: int, sample: int = 0) -> torch.Generator:
    """A CPU generator seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(purpose, seed, epoch, sample))
