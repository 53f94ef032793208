"""`spark-me data digits`: scikit-learn's digits, 1,797 real images of 8×8 pixels, enlarged, in class folders."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from spark_me.data.randomness import SUBSET, generator_of
from spark_me.errors import UserError, install_text
from spark_me.files import atomic_write, writing

SIDE = 64
"""Pixels along a side of the images that are written."""
VALIDATION_SHARE = 0.2
BRIGHTEST = 16
"""Largest value of the original images."""


def write_digits(folder: Path) -> None:
    """Write FOLDER/train/0 to FOLDER/val/9 with grey PNGs, a fifth of every digit in val; the same on every machine.

    Raises:
        UserError: if scikit-learn is missing, or the folder cannot be written to.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(f"the digits come with scikit-learn: {install_text('demo')}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    for split, label, place in tqdm(list(_split(digits.target)), desc="writing digits", leave=False, disable=None):
        path = folder / split / str(label) / f"{place:04d}.png"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            with atomic_write(path) as file:
                _enlarge(digits.images[place]).save(file, format="png")
    print(f"{len(digits.target)} images of {len(digits.target_names)} digits in {folder}")


def _split(targets: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """(split, digit, place among all images) of every image."""
    for label in range(10):
        own = np.flatnonzero(targets == label)
        held_out = round(VALIDATION_SHARE * len(own))
        order = torch.randperm(len(own), generator=generator_of(SUBSET, 0, 0, label)).tolist()
        for rank, index in enumerate(order):
            yield "val" if rank < held_out else "train", label, int(own[index])


def _enlarge(image: np.ndarray) -> Image.Image:
    grey = np.round(image * (255 / BRIGHTEST)).astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
