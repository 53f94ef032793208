"""Which samples each step sees, and which random numbers: functions of seed and step, so a run resumes anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass

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
INPUTS = 6
"""How a batch is mixed, before its step."""


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


@dataclass(frozen=True)
class Share:
    """Which samples of a run a process gets, whichever sampler hands them out."""

    batch_size: int
    """Samples in a step over all processes; a multiple of `world_size` · `accumulate`."""
    steps: int
    """Length of the run."""
    seed: int
    """The run's."""
    first_step: int = 0
    """Where to begin; steps done before."""
    rank: int = 0
    """This process, which gets its share of each batch."""
    world_size: int = 1
    """Number of processes."""
    accumulate: int = 1
    """Micro-batches that a process's share of a step comes in."""
    drop_last: bool = True
    """Whether an epoch's last batch is left out where it is not full, or else filled up."""

    def __len__(self) -> int:
        """Number of micro-batches."""
        return (self.steps - self.first_step) * self.accumulate


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (epoch, index) from one step to the last of the run, running over the ends of epochs.

    Every epoch is a new permutation. What does not fill a step's batch at its end is dropped, or filled up with its
    first samples. With `copies`, repeated augmentation: an epoch has as many samples, but each `copies` times in a row,
    so that it sees fewer of them.
    """

    def __init__(self, samples: int, share: Share, *, copies: int = 1) -> None:
        """
        Args:
            samples: samples in an epoch, at least the share's `batch_size`.
            share: this process's.
            copies: how often a sample comes, the k-th time (from 0) as the index k · samples + sample.
        """
        self.samples = samples
        self.share = share
        self.steps_per_epoch = steps_of_epoch(samples, share.batch_size, drop_last=share.drop_last)
        self.copies = copies

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share, order = self.share, list[int]()
        for step in range(share.first_step, share.steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if not order or batch == 0:
                order = self._order(epoch)
            start = batch * share.batch_size
            own = order[start + share.rank : start + share.batch_size : share.world_size]
            for part in range(share.accumulate):
                yield [(epoch, index) for index in own[part :: share.accumulate]]

    def _order(self, epoch: int) -> list[int]:
        order = torch.randperm(self.samples, generator=generator_of(ORDER, self.share.seed, epoch)).tolist()
        order = [index + copy * self.samples for index in order for copy in range(self.copies)][: self.samples]
        # One copy more than there are: another crop and another mask of the same image.
        missing = max(0, self.steps_per_epoch * self.share.batch_size - self.samples)
        return order + [index + self.copies * self.samples for index in order[:missing]]
