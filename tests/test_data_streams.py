"""The order of images in shards: permutations, partition, resume, replacement."""

import gzip
import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tar_shards import SIZES, png, write_shard, write_shards
from tiny_runs import SMALL

from spark_me.config.data import DataConfig
from spark_me.config.loading import load_config
from spark_me.config.tasks import PretrainConfig
from spark_me.data import shards
from spark_me.data.files import find_files
from spark_me.data.loaders import train_loader, train_reader
from spark_me.data.sampler import Share
from spark_me.data.shards import Shards
from spark_me.data.streams import ShardSampler, read_ahead
from spark_me.errors import UserError
from spark_me.train.checkpoint import list_checkpoints, read_checkpoint
from spark_me.train.pretrain import pretrain


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    return write_shards(tmp_path)


def shards_of(pattern: str) -> Shards:
    shards = find_files(DataConfig(kind="webdataset", root=pattern)).train
    assert isinstance(shards, Shards)
    return shards


def sampler(pattern: str, batch_size: int = 4, steps: int = 12, **arguments) -> ShardSampler:
    repeats, buffer = arguments.pop("repeats", 1), arguments.pop("buffer", 8)
    share = Share(batch_size, steps, **{"seed": 3, **arguments})
    return ShardSampler(shards_of(pattern), share, repeats=repeats, buffer=buffer)


def numbers(batches: list) -> list[int]:
    return [int(Path(image.name).stem) for batch in batches for _, _, image in batch]


def test_epochs_are_different_permutations(pattern: str) -> None:
    batches = list(sampler(pattern))
    assert len(batches) == len(sampler(pattern)) == 12
    epochs = [batches[:6], batches[6:]]
    for number, epoch in enumerate(epochs):
        assert sorted(numbers(epoch)) == list(range(24))
        assert {key[0] for batch in epoch for key in batch} == {number}
    assert numbers(epochs[0]) != numbers(epochs[1])
    assert numbers(list(sampler(pattern, seed=4))) != numbers(batches)
    # An image is drawn from more than its own shard.
    assert numbers(epochs[0])[:6] not in [list(range(start, start + 6)) for start in range(24)]


def test_an_images_index_is_its_own_in_every_epoch(pattern: str) -> None:
    index_of: dict[str, set[int]] = {}
    for batch in sampler(pattern, steps=18):
        for _, index, image in batch:
            index_of.setdefault(image.name, set()).add(index)
    assert all(len(indices) == 1 for indices in index_of.values())
    assert len(set.union(*index_of.values())) == 24


def test_buffer_of_one_keeps_the_order_of_a_shard(pattern: str) -> None:
    order = numbers(list(sampler(pattern, buffer=1, steps=6)))
    starts = np.cumsum([0, *SIZES[:-1]])
    expected = [list(range(start, start + size)) for start, size in zip(starts, SIZES)]
    pieces = sorted(expected, key=lambda piece: order.index(piece[0]))
    assert order == [number for piece in pieces for number in piece]


@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_at_any_step_continues_the_same_sequence(pattern: str, world_size: int) -> None:
    for rank in range(world_size):
        whole = list(sampler(pattern, rank=rank, world_size=world_size))
        for step in (0, 1, 5, 6, 9, 12):
            rest = sampler(pattern, rank=rank, world_size=world_size, first_step=step)
            assert list(rest) == whole[step:]
            assert len(rest) == len(whole) - step


class CountingFile(io.FileIO):
    """A file that counts the bytes which are read of all of them."""

    read_in_all = 0
    opened = 0

    def __init__(self, path: str) -> None:
        super().__init__(path)
        CountingFile.opened += 1

    def readinto(self, buffer: bytearray) -> int:
        count = super().readinto(buffer)
        CountingFile.read_in_all += count
        return count


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable], tuple[list, int]]:
    """All values of an iterable, and how many bytes of shards were read for them."""
    monkeypatch.setattr(shards, "open", lambda path, mode: io.BufferedReader(CountingFile(path)), raising=False)

    def count(values: Iterable) -> tuple[list, int]:
        CountingFile.read_in_all = CountingFile.opened = 0
        return list(values), CountingFile.read_in_all

    return count


@pytest.mark.parametrize("kind", ["tar", "gz", "pipe"])
def test_resuming_reads_no_image_again_where_it_can_seek(tmp_path: Path, kind: str, counted: Callable) -> None:
    size, urls = 200_000, []
    for shard in range(4):
        members = {f"{10 * shard + place}.png": os.urandom(size) for place in range(10)}
        write_shard(tmp_path / f"{shard}.tar", {**members, f"{shard}.txt": os.urandom(size)})
        if kind == "gz":
            (tmp_path / f"{shard}.tar").write_bytes(gzip.compress((tmp_path / f"{shard}.tar").read_bytes(), 0))
        urls.append("pipe:cat " * (kind == "pipe") + f"{tmp_path}/{shard}.tar")
    share = partial(Share, 4, 20, seed=0)
    whole, read = counted(ShardSampler(Shards(urls, 40), share(), repeats=1, buffer=8))
    others = 20_000 * 44 * 2  # headers, and what is read with them
    assert kind == "pipe" or 80 * size <= read <= 88 * size + others
    for step in (1, 4, 9, 10, 15):
        rest, read = counted(ShardSampler(Shards(urls, 40), share(first_step=step), repeats=1, buffer=8))
        assert rest == whole[step:]
        if kind == "tar":
            assert 4 * (20 - step) * size <= read <= 4 * (20 - step) * size + others
            assert CountingFile.opened <= 2 * 4 + 8  # shards of two epochs, and what was in the buffer
        elif kind == "gz" and step % 10:
            assert read > 4 * (20 - step) * size + 4 * step % 40 * size


def test_processes_read_different_shards(pattern: str) -> None:
    shares = [list(sampler(pattern, rank=rank, world_size=2, steps=6)) for rank in range(2)]
    assert [len(batch) for share in shares for batch in share] == [2] * 12
    owned = [{Path(image.name).parent for batch in share for _, _, image in batch} for share in shares]
    assert not owned[0] & owned[1]
    counts = Counter(key[1] for share in shares for batch in share for key in batch)
    assert set(counts.values()) == {1}
    with pytest.raises(UserError, match="4 shards cannot be split over 5 processes"):
        sampler(pattern, world_size=5)


def test_short_processes_begin_their_shards_again_under_other_indices(pattern: str) -> None:
    shards = Shards([shards_of(pattern).urls[0]], samples=15)  # it holds 5
    batches = list(ShardSampler(shards, Share(5, 3, seed=0), repeats=1, buffer=8))
    assert [sorted(numbers([batch])) for batch in batches] == [list(range(5))] * 3
    assert len({key[1] for batch in batches for key in batch}) == 15


def test_repeats_are_passes(pattern: str) -> None:
    batches = list(sampler(pattern, repeats=2, steps=12))
    assert Counter(numbers(batches)) == Counter(list(range(24)) * 2)


def test_the_last_batch_may_be_filled_up_with_images_that_come_again(pattern: str) -> None:
    batches = list(sampler(pattern, batch_size=5, steps=10, drop_last=False))
    for epoch in (batches[:5], batches[5:]):  # 24 images are 4.8 batches
        assert all(len(batch) == 5 for batch in epoch)
        assert set(numbers(epoch)) == set(range(24))
        assert len({key[1] for batch in epoch for key in batch}) == 25
    assert [{key[0] for key in batch} for batch in batches] == [{0}] * 5 + [{1}] * 5


def loader_config(pattern: str, workers: int) -> PretrainConfig:
    config = PretrainConfig(data=DataConfig(kind="webdataset", root=pattern, workers=workers, shuffle_buffer=8))
    config.model.image_size = [32, 64]
    return config


def loaded(pattern: str, workers: int, first_step: int = 0) -> list:
    config = loader_config(pattern, workers)
    reader, share = train_reader(config.data, config.model, seed=0), Share(4, 12, seed=0, first_step=first_step)
    loader = train_loader(shards_of(pattern), reader, config.data, share, most_unreadable=0, pin_memory=False)
    return list(loader)


def test_batches_are_the_same_with_any_number_of_workers_and_after_a_resume(pattern: str) -> None:
    whole = loaded(pattern, 0)
    assert len(whole) == 12
    for other, start in ((loaded(pattern, 2), 0), (loaded(pattern, 0, 7), 7)):
        assert len(other) == len(whole) - start
        for one, same in zip(whole[start:], other):
            assert torch.equal(one.images, same.images)
            assert one.indices == same.indices


def test_unreadable_image_is_replaced_from_its_batch(pattern: str) -> None:
    with tarfile.open(pattern.replace("{00..03}", "01"), "a") as archive:
        for name, content in (("bad.png", b"no image"), ("cut.png", png(0)[:400])):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    batches = loaded(pattern, 0)
    assert all(batch.images.shape == (4, 3, 32, 64) and len(set(batch.indices)) == 4 for batch in batches)
    bad = {name for batch in batches for name, _ in batch.unreadable}
    assert {Path(name).name for name in bad} == {"bad.png", "cut.png"}


def test_shards_without_images_are_no_endless_loop(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"a.txt": b"x"})
    with pytest.raises(UserError, match="no images in 1 shards"):
        list(ShardSampler(Shards([str(tmp_path / "a.tar")], 8), Share(4, 2, seed=0), repeats=1, buffer=4))


def test_reading_ahead_keeps_order_errors_and_stops() -> None:
    assert list(read_ahead(iter(range(50)), 3)) == list(range(50))

    def failing():
        yield 1
        raise UserError("broken")

    values = read_ahead(failing(), 3)
    assert next(values) == 1
    with pytest.raises(UserError, match="broken"):
        next(values)
    taken: list[int] = []
    endless = read_ahead((taken.append(number) or number for number in iter(int, 1)), 3)
    next(endless)
    endless.close()
    assert len(taken) <= 6


def test_run_on_shards_resumes_to_the_same_weights(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"""
model: {{encoder: {SMALL}, image_size: [64, 64], decoder_width: 32}}
data: {{kind: webdataset, root: "{pattern}", val_root: "{tmp_path}/00.tar", workers: 0, shuffle_buffer: 6}}
optim: {{name: adamw, warmup_epochs: 0}}
train: {{epochs: 1, batch_size: 8}}
run: {{device: cpu, checkpoint_every_steps: 1, keep_last: 9}}
"""
    )
    calm = load_config(tmp_path / "c.yaml", [f"run.dir={tmp_path / 'calm'}"])
    pretrain(calm)
    paths = list_checkpoints(tmp_path / "calm" / "checkpoints")
    assert len(paths) == 3
    assert (tmp_path / "calm" / "reconstruction.png").is_file()
    pretrain(load_config(tmp_path / "c.yaml", [f"run.dir={tmp_path / 'other'}", f"run.resume={paths[0]}"]))
    expected = read_checkpoint(paths[-1])["model"]
    actual = read_checkpoint(list_checkpoints(tmp_path / "other" / "checkpoints")[-1])["model"]
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
