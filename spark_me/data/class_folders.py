"""Labelled images in class folders, ImageNet's layout: which there are, and a balanced part of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from spark_me.config.data import FinetuneDataConfig
from spark_me.data.listing import Paths, class_folders, is_there
from spark_me.data.sampler import SUBSET, generator_of
from spark_me.errors import UserError, listed, shown


class Labelled(NamedTuple):
    """Images with their classes."""

    paths: Paths
    labels: list[int]
    """Places in the list of classes."""


class LabelledFiles(NamedTuple):
    """The images of a fine-tuning run."""

    train: Labelled
    val: Labelled
    classes: list[str]
    """Names of the class folders, sorted."""


def find_labelled(data: FinetuneDataConfig, seed: int) -> LabelledFiles:
    """List the training and validation images, of `data.fraction` those that `seed` draws.

    Raises:
        UserError: if a split or a class is missing, or a class folder is empty.
    """
    if data.val_root is None:
        train, classes = find_classes(Path(str(data.root)) / "train", f"data.root={data.root}: its train/")
    else:
        train, classes = find_classes(Path(str(data.root)), f"data.root={data.root}")
    val, val_classes = find_val(data)
    if val_classes != classes:
        only = listed([shown(name) for name in sorted(set(classes) ^ set(val_classes))])
        raise UserError(
            f"data.root={data.root}: {len(classes)} classes to train on and {len(val_classes)} to validate on differ "
            f"(in one of them alone: {only}): give both the same class folders"
        )
    return LabelledFiles(balanced_part(train, data.fraction, seed), val, classes)


def find_val(data: FinetuneDataConfig) -> tuple[Labelled, list[str]]:
    """The validation images, and the names of their classes.

    Raises:
        UserError: if they are missing, or a class folder is empty.
    """
    if data.val_root is not None:
        return find_classes(Path(data.val_root), f"data.val_root={data.val_root}")
    return find_classes(Path(str(data.root)) / "val", f"data.root={data.root}: its val/")


def find_classes(root: Path, key: str) -> tuple[Labelled, list[str]]:
    """The images of a folder of class folders, sorted, and the names of their classes.

    A class folder's own folders belong to it.

    Args:
        root: the folder.
        key: what names it, for messages.

    Raises:
        UserError: if there is no such folder, it has less than two class folders, or one has no images.
    """
    if not is_there(root, folder=True):
        raise UserError(f"{key}: no such folder: it has to hold a folder for each class")
    found = class_folders(root)
    if len(found) < 2:
        number = "one class folder alone" if found else "no class folders"
        raise UserError(f"{key}: has {number}: put each class's images in a folder of its own")
    empty = [shown(name) for name, paths in found.items() if not paths]
    if empty:
        raise UserError(f"{key}: no images in {len(empty)} class folders ({listed(empty)}): fill or remove them")
    labels = [label for label, paths in enumerate(found.values()) for _ in paths]
    return Labelled(Paths(path for paths in found.values() for path in paths), labels), list(found)


def balanced_part(images: Labelled, fraction: float, seed: int) -> Labelled:
    """The same share of every class, at least one image of each, in their order."""
    if fraction == 1:
        return images
    kept = balanced_places(images.labels, fraction, seed)
    return Labelled(images.paths.select(kept), [images.labels[place] for place in kept])


def balanced_places(labels: Sequence[int], fraction: float, seed: int) -> list[int]:
    """Draw the same share of every class; a smaller share lies within a larger one.

    Args:
        labels: [n].
        fraction: in (0, 1].
        seed: decides which.

    Returns:
        Sorted places in `labels`; of each class the rounded share, and at least one.
    """
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    kept: list[int] = []
    for label, own in places.items():
        order = torch.randperm(len(own), generator=generator_of(SUBSET, seed, 0, label)).tolist()
        kept += [own[place] for place in order[: max(1, round(fraction * len(own)))]]
    return sorted(kept)
