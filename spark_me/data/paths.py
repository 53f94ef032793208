"""Names of millions of files in one buffer, which worker processes share."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np
import torch


class Paths(Sequence[Path]):
    """Paths in their order.

    A list of them costs each worker some 640 bytes a path: to look at a Python object is to write to its page, so that
    the page is copied. Here a path is made when it is asked for. The buffers are tensors, as torch hands those to
    workers in shared memory where they are not forked.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]] = ()) -> None:
        names = [os.fsencode(path) for path in paths]
        ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self._set(b"".join(names), ends)

    def _set(self, names: bytes, ends: np.ndarray) -> None:
        self._names = torch.from_numpy(np.frombuffer(names, dtype=np.uint8).copy())
        self._ends = torch.from_numpy(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int, /) -> Path: ...

    @overload
    def __getitem__(self, index: slice, /) -> "Paths": ...

    def __getitem__(self, index: int | slice, /) -> "Path | Paths":
        places = range(len(self))[index]
        return self.select(places) if isinstance(places, range) else Path(os.fsdecode(self._name(places)))

    def __iter__(self) -> Iterator[Path]:
        return (Path(os.fsdecode(name)) for name in self._many(range(len(self))))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Paths):
            return torch.equal(self._ends, other._ends) and torch.equal(self._names, other._names)
        return list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[Path]) -> "Paths":
        return Paths(chain(self, other))

    def __repr__(self) -> str:
        return f"<{len(self)} paths>"

    def select(self, places: Iterable[int]) -> "Paths":
        """Some of the paths, in the order of their places."""
        names = list(self._many(places))
        selected = Paths()
        selected._set(b"".join(names), np.cumsum([0, *map(len, names)], dtype=np.int64))
        return selected

    def _name(self, place: int) -> bytes:
        return next(self._many([place]))

    def _many(self, places: Iterable[int]) -> Iterator[bytes]:
        names, ends = self._names.numpy().data, self._ends.numpy()
        return (names[ends[place] : ends[place + 1]].tobytes() for place in places)
