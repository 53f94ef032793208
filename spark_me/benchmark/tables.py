"""How long the index structures of a batch take: the pyramid, and every table that the encoder's layers ask for."""

from collections.abc import Callable
from typing import Any

import torch

from spark_me import sparse
from spark_me.benchmark.case import Case
from spark_me.benchmark.timing import time_median
from spark_me.encoder import sparsify
from spark_me.networks import dense_network

Call = tuple[str, tuple[Any, ...]]
"""A method of `Neighbours` and its arguments."""


def time_tables(case: Case, *, runs: int, warmup: int) -> float:
    """Median seconds to build the `native` backend's pyramid and neighbour tables for one batch."""
    _, visible = case.draw()
    calls = calls_of_a_pass(case)

    def build() -> None:
        pyramid = sparse.Pyramid(visible, case.patch_size, "native", case.device)
        pyramid.raster_index(1)  # gathers the visible pixels
        for method, arguments in calls:
            getattr(pyramid.neighbours, method)(*arguments)
        if case.device == "cuda":
            torch.cuda.synchronize()

    return time_median(build, runs=runs, warmup=warmup)


def calls_of_a_pass(case: Case) -> list[Call]:
    """What the encoder's forward and backward pass asks the tables for, each question once."""
    images, visible = case.draw()
    pyramid = sparse.Pyramid(visible, case.patch_size, "native", case.device)
    recorder: Any = _Recorder(pyramid.neighbours)
    pyramid.neighbours = recorder
    encoder = sparsify(dense_network(case.encoder)).to(case.device)
    with case.computing():
        with case.autocast():
            features = encoder(sparse.to_sparse(images, pyramid))
        torch.stack([x.F.mean(dtype=torch.float32) for x in features]).sum().backward()
    return list(recorder.calls)


class _Recorder:
    """Passes everything on to a pyramid's tables and remembers which methods were called with what."""

    def __init__(self, neighbours: Any) -> None:
        self._neighbours = neighbours
        self.calls: dict[Call, None] = {}

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._neighbours, name)
        return self._recording(name, attribute) if callable(attribute) else attribute

    def _recording(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls[name, arguments] = None
            return method(*arguments)

        return call
