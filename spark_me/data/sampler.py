"""Which samples each step sees, and which random numbers: functions of seed and step, so a run resumes anywhere."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

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


def steps_of_epoch(samples: int, batch_size: int, *, drop_last: bool) -> int:
    """How many batches an epoch has, of which the last may be left out where it is not full."""
    return samples // batch_size if drop_last else -(-samples // batch_size)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (epoch, index) from one step to the last of the run, running over the ends of epochs.

    Every epoch is a new permutation. What does not fill a step's batch at its end is dropped, or filled up with its
    first samples. With `copies`, repeated augmentation: an epoch has as many samples, but each `copies` times in a row,
    so that it sees fewer of them.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        steps: int,
        *,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        copies: int = 1,
        drop_last: bool = True,
    ) -> None:
        """
        Args:
            samples: samples in an epoch, at least `batch_size`.
            batch_size: samples in a step over all processes; a multiple of `world_size` · `accumulate`.
            steps: length of the run.
            seed: the run's seed.
            first_step: where to begin; steps done before.
            rank: this process, which gets its share of each batch.
            world_size: number of processes.
            accumulate: micro-batches that a process's share of a step comes in.
            copies: how often a sample comes, the k-th time (from 0) as the index k · samples + sample.
            drop_last: whether an epoch's last batch is left out where it is not full, or else filled up.
        """
        self.samples = samples
        self.batch_size = batch_size
        self.steps_per_epoch = steps_of_epoch(samples, batch_size, drop_last=drop_last)
        self.steps = steps
        self.seed = seed
        self.first_step = first_step
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate
        self.copies = copies

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        for step in range(self.first_step, self.steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if not order or batch == 0:
                order = self._order(epoch)
            start = batch * self.batch_size
            share = order[start + self.rank : start + self.batch_size : self.world_size]
            for part in range(self.accumulate):
                yield [(epoch, index) for index in share[part :: self.accumulate]]

    def _order(self, epoch: int) -> list[int]:
        order = torch.randperm(self.samples, generator=generator_of(ORDER, self.seed, epoch)).tolist()
        order = [index + copy * self.samples for index in order for copy in range(self.copies)][: self.samples]
        # One copy more than there are: another crop and another mask of the same image.
        missing = max(0, self.steps_per_epoch * self.batch_size - self.samples)
        return order + [index + self.copies * self.samples for index in order[:missing]]
