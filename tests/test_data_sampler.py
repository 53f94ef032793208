"""The order of samples: a permutation in every epoch, the same from any step on, split between processes."""

from spark_me.data.randomness import CROP, ORDER, seed_of
from spark_me.data.sampler import StepSampler


def test_every_epoch_is_a_permutation_without_the_ragged_end() -> None:
    batches = list(StepSampler(10, 3, steps=12, seed=0))
    assert len(batches) == len(StepSampler(10, 3, steps=12, seed=0)) == 12
    for epoch in range(4):
        keys = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        indices = {index for _, index in keys}
        assert len(indices) == 9 and indices <= set(range(10))


def test_epochs_and_seeds_differ() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        return [tuple(index for _, index in batch) for batch in StepSampler(50, 50, steps=3, seed=seed)]

    assert len({*orders(0), *orders(1)}) == 6


def test_resuming_at_any_step_continues_the_same_sequence() -> None:
    whole = list(StepSampler(10, 3, steps=9, seed=5))
    for step in range(len(whole) + 1):
        rest = StepSampler(10, 3, steps=9, seed=5, first_step=step)
        assert list(rest) == whole[step:]
        assert len(rest) == len(whole) - step


def test_processes_share_each_batch() -> None:
    whole = list(StepSampler(20, 6, steps=6, seed=1))
    shares = [list(StepSampler(20, 6, steps=6, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert sorted(key for share in shares for key in share[step]) == sorted(batch)
        assert [len(share[step]) for share in shares] == [2, 2, 2]


def test_micro_batches_share_a_process_s_part() -> None:
    whole = list(StepSampler(30, 12, steps=4, seed=1, first_step=1, rank=1, world_size=2))
    sampler = StepSampler(30, 12, steps=4, seed=1, first_step=1, rank=1, world_size=2, accumulate=3)
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
