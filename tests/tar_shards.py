"""Webdataset shards for tests: 24 images in four tars, each with a label and a description beside it."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = (5, 7, 6, 6)


def png(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_shards(folder: Path) -> str:
    """Write them, and return their brace pattern."""
    number = 0
    for shard, size in enumerate(SIZES):
        members = {}
        for _ in range(size):
            members[f"{number:03}.cls"] = b"1"
            members[f"{number:03}.png"] = png(number)
            members[f"{number:03}.json"] = b"{}"
            number += 1
        write_shard(folder / f"{shard:02}.tar", members)
    return f"{folder}/{{00..03}}.tar"
