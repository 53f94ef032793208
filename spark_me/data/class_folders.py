"""Labelled images in class folders, ImageNet's layout: which there are, and a balanced part of them."""

from pathlib import Path
from typing import NamedTuple

import torch

from spark_me.config_finetune import FinetuneDataConfig
from spark_me.data.listing import class_folders, is_there
from spark_me.data.paths import Paths
from spark_me.data.randomness import SUBSET, generator_of
from spark_me.errors import UserError

LISTED = 5


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
        train, classes = _class_folders(Path(str(data.root)) / "train", f"data.root={data.root}: its train/")
    else:
        train, classes = _class_folders(Path(str(data.root)), f"data.root={data.root}")
    val, val_classes = find_val(data)
    if val_classes != classes:
        only = sorted(set(classes) ^ set(val_classes))
        shown = ", ".join(only[:LISTED]) + (f" and {len(only) - LISTED} more" if len(only) > LISTED else "")
        raise UserError(
            f"data.root={data.root}: {len(classes)} classes to train on and {len(val_classes)} to validate on differ "
            f"(in one of them alone: {shown}): give both the same class folders"
        )
    return LabelledFiles(balanced_part(train, data.fraction, seed), val, classes)


def find_val(data: FinetuneDataConfig) -> tuple[Labelled, list[str]]:
    """The validation images, and the names of their classes.

    Raises:
        UserError: if they are missing, or a class folder is empty.
    """
    if data.val_root is not None:
        return _class_folders(Path(data.val_root), f"data.val_root={data.val_root}")
    return _class_folders(Path(str(data.root)) / "val", f"data.root={data.root}: its val/")


def _class_folders(root: Path, key: str) -> tuple[Labelled, list[str]]:
    if not is_there(root, folder=True):
        raise UserError(f"{key}: no such folder: give data.root the folder above train/ and val/, or add data.val_root")
    found = class_folders(root)
    if len(found) < 2:
        number = "one class folder alone" if found else "no class folders"
        raise UserError(f"{key}: has {number}: put each class's images in a folder of its own")
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        shown = ", ".join(empty[:LISTED])
        raise UserError(f"{key}: no images in {len(empty)} class folders ({shown}): fill or remove them")
    labels = [label for label, paths in enumerate(found.values()) for _ in paths]
    return Labelled(Paths(path for paths in found.values() for path in paths), labels), list(found)


def balanced_part(images: Labelled, fraction: float, seed: int) -> Labelled:
    """The same share of every class, at least one image of each, in their order."""
    if fraction == 1:
        return images
    places: dict[int, list[int]] = {}
    for place, label in enumerate(images.labels):
        places.setdefault(label, []).append(place)
    kept: list[int] = []
    for label, own in places.items():
        order = torch.randperm(len(own), generator=generator_of(SUBSET, seed, 0, label)).tolist()
        kept += [own[place] for place in order[: max(1, round(fraction * len(own)))]]
    kept.sort()
    return Labelled(images.paths.select(kept), [images.labels[place] for place in kept])
