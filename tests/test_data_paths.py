"""Paths in one buffer: as a list of them, but at no cost to worker processes."""

import gc
import os
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing  # noqa: F401  (teaches the pickler of worker processes to share tensors)

from spark_me.config.data import DataConfig
from spark_me.data.files import find_files, fingerprint
from spark_me.data.listing import Paths
from spark_me.downstream.images import find_images

NAMES = ["b/a.png", "a/ü.png", os.fsdecode(b"caf\xe9.png"), "a/new\nline.png", "z.png", "a/ü.png"]
MANY = 60_000


def test_as_a_list() -> None:
    expected = [Path(name) for name in NAMES]
    paths = Paths(expected)
    assert paths == expected and expected == paths and paths == Paths(NAMES)
    assert paths != expected[::-1] and paths != Paths(expected[1:]) and Paths() == []
    assert len(paths) == 6 and [paths[place] for place in range(-6, 6)] == expected * 2
    assert paths[np.int64(2)] == expected[2] and paths[1:4] == expected[1:4] and paths[::-1] == expected[::-1]
    assert paths.select([4, 0, 0]) == [expected[4], expected[0], expected[0]]
    assert paths + expected[:1] == expected + expected[:1]
    assert set(paths) == set(expected) and expected[2] in paths
    assert pickle.loads(pickle.dumps(paths)) == paths
    for place in (6, -7):
        with pytest.raises(IndexError):
            paths[place]


def test_fingerprints_are_those_of_lists() -> None:
    paths = [Path(name) for name in NAMES]
    assert fingerprint(Paths(paths)) == fingerprint(paths)
    # Of a run that an earlier version began.
    assert fingerprint(Paths(["x/a.png", "x/b.png"])) == "2 files, 37beb2d9292f6031"


def test_listed_images_are_such(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "val/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("train/a/1.png\ntrain/b/2.png\n")
    for kind, root in {"images": ".", "imagefolder": "train", "imagenet": ".", "list": "list.txt"}.items():
        files = find_files(DataConfig(kind=kind, root=str(tmp_path / root)))
        assert isinstance(files.train, Paths) and isinstance(files.held_out, Paths)
    held_out = find_files(DataConfig(root=str(tmp_path), held_out=1))
    assert isinstance(held_out.train, Paths) and isinstance(held_out.held_out, Paths)
    assert isinstance(find_images([tmp_path]), Paths)


def test_workers_that_are_no_forks_share_the_names() -> None:
    paths = Paths(f"/data/images/{number:08}.jpg" for number in range(MANY))
    assert len(ForkingPickler.dumps(paths)) < 10_000


def private_growth(touch: Callable[[], object]) -> int:
    """Bytes of its own that a forked process has more after a call than before."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            gc.disable()  # it writes to all objects of this process, whatever they are
            before = _private()
            touch()
            os.write(writer, str(_private() - before).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as file:
        return int(file.read())


def _private() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not say")
def test_worker_that_touches_every_name_copies_none() -> None:
    paths = Paths(f"/data/images/{number:08}.jpg" for number in range(MANY))

    def touch(items: Paths | list[Path], different: int) -> None:
        for number in range(MANY):
            str(items[number % different])

    touch(paths, 10)  # what is imported on the way
    # Making paths takes memory, too, and more of it in a process that has much to copy.
    usual = private_growth(lambda: touch(paths, 1000))
    assert private_growth(lambda: touch(paths, MANY)) < usual + 3e6
    listed = list(paths)
    assert private_growth(lambda: touch(listed, MANY)) > 9e6  # what is spared
