"""Peak memory of a pass, against allocations of known size."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from tiny_bench import NATIVE, TINY

from spark_me.bench.timing import activation_bytes, peak_in_memory
from spark_me.bench.workloads import Workload
from spark_me.errors import UserError


class Greedy:
    """Two tensors of 64 MiB, one after the other."""

    def run(self) -> None:
        for _ in range(2):
            torch.ones(2**24)

    def clear(self) -> None: ...


def test_peak_is_what_a_pass_holds_at_once():
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(peak_in_memory, Greedy()).result()
    if peak is None:
        pytest.skip("this platform does not tell a process's peak memory")
    assert peak / 2**20 == pytest.approx(64, abs=8)


def test_memory_grows_with_the_batch(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small, large = (
        activation_bytes(dataclasses.replace(TINY, batch=batch, image_size=(128, 128)), "encoder", NATIVE)
        for batch in (8, 64)  # enough to drown some MiB that other work in memory makes them differ by
    )
    if small is None or large is None:
        pytest.skip("this platform does not tell a process's peak memory")
    assert 4 < large / small < 12


def test_memory_is_none_where_the_platform_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr("spark_me.bench.timing.CLEAR_REFS", tmp_path / "none" / "clear_refs")
    assert peak_in_memory(Workload(TINY, "encoder", NATIVE)) is None


def test_a_killed_memory_process_is_said(monkeypatch):
    class Killed:
        def __init__(self, *arguments: object, **options: object) -> None: ...

        def __enter__(self) -> "Killed":
            return self

        def __exit__(self, *error: object) -> None: ...

        def submit(self, *arguments: object) -> None:
            raise BrokenProcessPool

    monkeypatch.setattr("spark_me.bench.timing.ProcessPoolExecutor", Killed)
    with pytest.raises(UserError, match="lower --batch 2"):
        activation_bytes(TINY, "encoder", NATIVE)
