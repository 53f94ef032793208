"""`spark-me data check`: opens every image wholly and lists what cannot be used."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spark_me.config import Config
from spark_me.config_data import DataConfig, statistics_of
from spark_me.data.files import find_files
from spark_me.data.reading import Item, decode, to_picture
from spark_me.data.transforms import require_moderate
from spark_me.data.unreadable import UnreadableImage, as_lines
from spark_me.data.visiting import visit
from spark_me.errors import printable
from spark_me.files import check_output, write_text

COMMONEST = 5
"""Kinds of images that the summary names."""


class Found(NamedTuple):
    """What an image is."""

    name: str = ""
    """Empty where readable, of which there may be millions."""
    reason: str | None = None
    """Why it is unreadable."""
    height: int = 0
    width: int = 0
    stored_as: str = ""
    """Pillow's mode, or channels and type."""


def check(config: Config, out: Path | None) -> int:
    """Open the training and the held-out images, print or write a list, and print a summary.

    Returns:
        1 if any is unreadable, else 0.

    Raises:
        UserError: if there are no images, or the list cannot be written.
    """
    check_output(out, str(config.data.root))  # which may be a list of files itself
    channels = config.model.in_channels
    function = partial(examine, channels=channels, data=config.data)
    found: list[Found] = []
    for images in find_files(config.data, channels):
        if len(images):
            found += visit(images, function, workers=config.data.workers, what="checking")
    unreadable = sorted((image.name, image.reason) for image in found if image.reason is not None)
    if out is None:
        for name, reason in unreadable:
            print(f"{printable(name)}\t{printable(reason)}")
    else:
        write_text(out, as_lines(unreadable))
    print(_summary([image for image in found if image.reason is None], len(unreadable)))
    return 1 if unreadable else 0


def examine(item: Item, channels: int, data: DataConfig) -> Found:
    """Read one image as training would."""
    try:
        decoded = decode(item, channels)
        picture = to_picture(decoded, channels, data.nodata)
        if isinstance(picture, Tensor):
            if picture.isnan().all():
                raise UnreadableImage("nodata: no pixel has data")
            statistics = statistics_of(data, channels)
            if all(values is not None and len(values) == channels for values in statistics):
                mean, std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
                require_moderate(((picture - mean) / std).nan_to_num(0), picture)
    except UnreadableImage as reason:
        return Found(str(item), str(reason))
    height, width = picture.shape[1:] if isinstance(picture, Tensor) else (picture.height, picture.width)
    if isinstance(decoded, np.ndarray):
        return Found("", None, height, width, f"{decoded.shape[2]}×{decoded.dtype}")
    return Found("", None, height, width, decoded.mode)


def _summary(images: list[Found], unreadable: int) -> str:
    summary = f"{len(images) + unreadable} images, {unreadable} unreadable"
    if not images:
        return summary
    sizes = sorted(((image.height, image.width) for image in images), key=lambda size: size[0] * size[1])
    smallest, median, largest = (sizes[place] for place in (0, len(sizes) // 2, -1))
    size = " / ".join(f"{height}×{width}" for height, width in (smallest, median, largest))
    kinds = Counter(image.stored_as for image in images)
    named = ", ".join(f"{kind} ({number})" for kind, number in kinds.most_common(COMMONEST))
    more = f" and {len(kinds) - COMMONEST} more" if len(kinds) > COMMONEST else ""
    return f"{summary}; height×width smallest / median / largest {size}; stored as {named}{more}"
