"""The order of samples: a permutation in every epoch, the same from any step on, split between processes."""

import pytest

from spark_me.data.sampler import CROP, ORDER, Share, StepSampler, seed_of


def test_every_epoch_is_a_permutation_without_the_ragged_end() -> None:
    batches = list(StepSampler(10, Share(3, steps=12, seed=0)))
    assert len(batches) == len(StepSampler(10, Share(3, steps=12, seed=0))) == 12
    for epoch in range(4):
        keys = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        indices = {index for _, index in keys}
        assert len(indices) == 9 and indices <= set(range(10))


@pytest.mark.parametrize("copies", [1, 2])
def test_the_ragged_end_may_be_filled_up_with_other_crops_of_the_epochs_first_images(copies: int) -> None:
    sampler = StepSampler(10, Share(4, steps=6, seed=0, drop_last=False), copies=copies)
    assert sampler.steps_per_epoch == 3
    epochs = [[key for batch in list(sampler)[start : start + 3] for key in batch] for start in (0, 3)]
    for number, keys in enumerate(epochs):
        assert {epoch for epoch, _ in keys} == {number}
        indices = [index for _, index in keys]
        assert len(indices) == len(set(indices)) == 12  # no crop twice
        assert [index % 10 for index in indices[10:]] == [index % 10 for index in indices[:2]]
        whole = list(StepSampler(10, Share(10, steps=2, seed=0), copies=copies))[number]
        assert indices[:10] == [index for _, index in whole]
    # Nothing to fill up.
    shares = (Share(4, steps=3, seed=0, drop_last=drop_last) for drop_last in (False, True))
    filled, dropped = (list(StepSampler(12, share)) for share in shares)
    assert filled == dropped


def test_epochs_and_seeds_differ() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        return [tuple(index for _, index in batch) for batch in StepSampler(50, Share(50, steps=3, seed=seed))]

    assert len({*orders(0), *orders(1)}) == 6


def test_resuming_at_any_step_continues_the_same_sequence() -> None:
    whole = list(StepSampler(10, Share(3, steps=9, seed=5)))
    for step in range(len(whole) + 1):
        rest = StepSampler(10, Share(3, steps=9, seed=5, first_step=step))
        assert list(rest) == whole[step:]
        assert len(rest) == len(whole) - step


def test_processes_share_each_batch() -> None:
    whole = list(StepSampler(20, Share(6, steps=6, seed=1)))
    shares = [list(StepSampler(20, Share(6, steps=6, seed=1, rank=rank, world_size=3))) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert sorted(key for share in shares for key in share[step]) == sorted(batch)
        assert [len(share[step]) for share in shares] == [2, 2, 2]


def test_micro_batches_share_a_process_s_part() -> None:
    whole = list(StepSampler(30, Share(12, steps=4, seed=1, first_step=1, rank=1, world_size=2)))
    sampler = StepSampler(30, Share(12, steps=4, seed=1, first_step=1, rank=1, world_size=2, accumulate=3))
    parts = list(sampler)
    assert len(parts) == len(sampler) == 3 * len(whole)
    assert {len(part) for part in parts} == {2}
    for step, share in enumerate(whole):
        assert sorted(key for part in parts[3 * step : 3 * step + 3] for key in part) == sorted(share)


def test_streams_of_random_numbers_are_apart() -> None:
    seeds = {
        seed_of(purpose, seed, epoch, sample)
        for purpose in (ORDER, CROP)
        for seed in range(4)
        for epoch in range(4)
        for sample in range(4)
    }
    assert len(seeds) == 2 * 4**3
