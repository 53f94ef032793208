"""Images in one folder a class, and balanced parts of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spark_me.data.listing import class_folders
from spark_me.data.paths import Paths
from spark_me.errors import UserError, shown


class Labelled(NamedTuple):
    """Images with their classes."""

    paths: Paths
    labels: np.ndarray
    """int64 [n], places in `classes`."""
    classes: list[str]
    """Sorted."""


def find_labelled(root: Path, option: str) -> Labelled:
    """The images of a folder of class folders, sorted; a class folder's own folders belong to it.

    Args:
        root: the folder.
        option: what names it, for messages.

    Raises:
        UserError: if there is no such folder, it has less than two class folders, or one has no images.
    """
    if not root.is_dir():
        raise UserError(f"{option} {root}: no such folder: give one with a folder for each class")
    images = class_folders(root)
    classes = list(images)
    if len(classes) < 2:
        found = f"the one class folder {shown(classes[0])}" if classes else "no class folders"
        raise UserError(f"{option} {root}: has {found}: put the images of each class into a folder of its own")
    for name, own in images.items():
        if not own:
            raise UserError(f"{option} {root / name}: no images of this class: add some, or remove the folder")
    labels = [label for label, own in enumerate(images.values()) for _ in own]
    return Labelled(Paths(path for own in images.values() for path in own), np.array(labels), classes)


def require_equal_classes(train: Labelled, test: Labelled) -> None:
    """Refuse training and test images of different classes.

    Raises:
        UserError: naming those that only one of them has.
    """
    problems = [
        f"{', '.join(map(shown, names[:5]))}{', …' if len(names) > 5 else ''} only in {where}"
        for where, names in (
            ("--train", sorted(set(train.classes) - set(test.classes))),
            ("--test", sorted(set(test.classes) - set(train.classes))),
        )
        if names
    ]
    if problems:
        raise UserError(f"--train and --test have different class folders: {'; '.join(problems)}: make them the same")


def balanced_part(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The same share of each class, drawn at random.

    Args:
        labels: [n].
        fraction: in (0, 1].
        seed: decides which.

    Returns:
        Sorted places in `labels`; of each class the rounded share, and at least one.
    """
    generator = np.random.default_rng(seed)
    labels = np.asarray(labels)
    chosen = []
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        chosen.append(places[: max(1, round(fraction * len(places)))])
    return np.sort(np.concatenate(chosen))
