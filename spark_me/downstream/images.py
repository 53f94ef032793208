"""Many images through a network: read in worker processes, in batches, with a progress bar; damaged ones are noted."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spark_me.data.listing import Paths, is_there, list_images
from spark_me.data.loaders import visit
from spark_me.data.reading import Item
from spark_me.data.unreadable import UnreadableImage
from spark_me.downstream.preprocessing import Preprocessing
from spark_me.errors import UserError, printable


class Results(NamedTuple):
    """What came out of many images."""

    rows: Tensor
    """[n, …] on the CPU, of the readable images in their order."""
    places: list[int]
    """Which of the images they belong to."""
    unreadable: list[tuple[Path, str]]
    """The others, with the reason."""


def over_images(
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    compute: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    workers: int | None,
    what: str,
) -> Results:
    """Compute something of each image.

    Args:
        paths: image files.
        preprocessing: how they are shown.
        compute: [B, C, H, W] on the CPU → [B, …], each row from its own image alone.
        batch_size: B at most.
        workers: processes that read, one a CPU but 4 at most when None; none for images of a single batch.
        what: for the progress bar.

    Raises:
        UserError: if none of the images is readable, or for a batch of no images.
    """
    workers = min(4, os.cpu_count() or 1) if workers is None else workers
    if batch_size < 1 or workers < 0:
        raise UserError(f"batch size {batch_size} and {workers} workers: must be at least 1 and 0")
    rows: list[Tensor] = []
    places: list[int] = []
    unreadable: list[tuple[Path, str]] = []
    seen = visit(paths, partial(_read, preprocessing), workers=workers if len(paths) > batch_size else 0, what=what)
    readable = _set_aside(seen, paths, unreadable)
    for batch in _in_batches(readable, batch_size):
        rows.append(compute(torch.stack([image for _, image in batch])).cpu())
        places += [place for place, _ in batch]
    if not rows:
        path, reason = unreadable[0]
        raise UserError(f"none of {len(paths)} images is readable; the first is {path} ({reason})")
    results = torch.cat(rows)
    bad = (~results.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        first = printable(str(paths[places[bad[0]]]))
        print(f"spark-me: {len(bad)} of {len(results)} images give no finite numbers, first {first}", file=sys.stderr)
    return Results(results, places, unreadable)


def find_images(arguments: Iterable[Path]) -> Paths:
    """Files as they are; of folders, the images at any depth, sorted.

    Raises:
        UserError: for a folder without images.
    """
    paths: list[Path] = []
    for argument in arguments:
        found = list_images(argument) if is_there(argument, folder=True) else [argument]
        if not found:
            raise UserError(f"{argument}: no images in there (what Pillow opens, or .npy): check the path")
        paths += found
    return Paths(paths)


def report(unreadable: Sequence[tuple[Path, str]]) -> int:
    """Say on stderr which images were left out, in one line each.

    Returns:
        The exit code: 1 if there are any, else 0.
    """
    for path, reason in unreadable:
        print(printable(f"{path}: unreadable ({reason}), left out"), file=sys.stderr)
    return 1 if unreadable else 0


def _read(preprocessing: Preprocessing, item: Item) -> Tensor | str:
    """The image, or the reason why there is none."""
    try:
        return preprocessing.read(item)
    except UnreadableImage as reason:
        return str(reason)


def _set_aside(
    seen: Iterable[Tensor | str], paths: Sequence[Path], unreadable: list[tuple[Path, str]]
) -> Iterator[tuple[int, Tensor]]:
    for place, image in enumerate(seen):
        if isinstance(image, str):
            unreadable.append((paths[place], image))
        else:
            yield place, image


def _in_batches(images: Iterator[tuple[int, Tensor]], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    while batch := list(islice(images, size)):
        yield batch
