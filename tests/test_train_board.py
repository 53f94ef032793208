"""TensorBoard's file: what its reader makes of it, and a disk that is full at any moment."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spark_me.train.logs import Board


@contextmanager
def files_of(limit: int) -> Iterator[None]:
    """Files may not grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(board: Board) -> None:
    for step in range(3):
        board.add_scalar("loss", 1 / (step + 1), step)
    board.add_image("picture", np.full((9, 7, 3), 128, np.uint8), 2)
    board.close()


def test_curves_and_pictures_are_read_back(tmp_path: Path) -> None:
    fill(Board(tmp_path / "board", 0))
    read = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (step, pytest.approx(1 / (step + 1))) for step in range(3)
    ]
    (picture,) = read.Images("picture")
    assert (picture.width, picture.height, picture.step) == (7, 9, 2)


def test_a_resumed_run_hides_what_it_does_again(tmp_path: Path) -> None:
    fill(Board(tmp_path, 0))
    board = Board(tmp_path, 2)
    board.add_scalar("loss", 7, 2)
    board.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in read.Scalars("loss")] == [0, 1, 2] and read.Scalars("loss")[2].value == 7


@pytest.mark.parametrize("limit", [0, 10, 60, 100, 150, 200, 300])
def test_a_full_disk_is_said_once(tmp_path: Path, limit: int) -> None:
    said: list[str] = []
    with files_of(limit):
        fill(Board(tmp_path / "board", 0, said.append))
    (line,) = said
    assert "TensorBoard's file cannot be written (File too large): the run goes on" in line


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "board").write_text("a file")
    fill(Board(tmp_path / "board", 0, said.append))
    assert len(said) == 1
