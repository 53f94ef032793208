"""Which files a run reads: every kind of data set comes down to a sorted list of paths."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from spark_me.config_schema import DataConfig
from spark_me.errors import UserError

# Real photographs in scikit-image's wheel. Two are held out; of the stereo pair one is enough.
DEMO_HELD_OUT = ("chelsea.png", "coffee.png")
DEMO_PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "clock_motion.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


class Files(NamedTuple):
    """The images of a run."""

    train: list[Path]
    held_out: list[Path]


def find_files(data: DataConfig) -> Files:
    """List the training and held-out images of a run.

    Raises:
        UserError: if the folder or list is missing or has no images, or nothing is left to train on.
    """
    if data.kind == "demo":
        folder = _demo_folder()
        return Files([folder / name for name in DEMO_PHOTOS], [folder / name for name in DEMO_HELD_OUT])
    files = _list_images(data.kind, Path(str(data.root)), "data.root")
    if data.val_root is not None:
        return Files(files, _list_images(data.kind, Path(data.val_root), "data.val_root"))
    return _hold_out(files, data.held_out)


def fingerprint(files: Sequence[Path]) -> str:
    """A digest of the files' number, order and names, to notice that a data set changed under a run."""
    names = "\n".join(f"{path.parent.name}/{path.name}" for path in files)
    return f"{len(files)} files, {hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest()[:16]}"


def _list_images(kind: str, root: Path, key: str) -> list[Path]:
    finders = {"images": _walk, "imagefolder": _class_folders, "list": _read_list}
    expected = "text file" if kind == "list" else "folder"
    if not (root.is_file() if kind == "list" else root.is_dir()):
        raise UserError(f"{key}={root}: no such {expected}: give the path of your images (data.kind={kind})")
    files = sorted(finders[kind](root))
    if not files:
        raise UserError(f"{key}={root}: no images in there ({', '.join(IMG_EXTENSIONS)}): check the path or data.kind")
    return files


def _walk(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root, followlinks=True):
        yield from (Path(folder, name) for name in names if name.lower().endswith(IMG_EXTENSIONS))


def _class_folders(root: Path) -> Iterator[Path]:
    try:
        yield from (Path(path) for path, _ in ImageFolder(root, allow_empty=True).samples)
    except FileNotFoundError:  # no folder in root
        raise UserError(f"{root}: has no class folders: use data.kind=images for images without labels") from None


def _read_list(path: Path) -> Iterator[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no UTF-8 text: data.kind=list wants one image path a line") from None
    yield from (path.parent / line.strip() for line in lines if line.strip())


def _hold_out(files: list[Path], count: int) -> Files:
    if count >= len(files):
        raise UserError(f"data.held_out={count} leaves none of {len(files)} images to train on: lower it")
    # Evenly spaced, so that images sorted by class or by time are represented alike.
    places = {(2 * i + 1) * len(files) // (2 * count) for i in range(count)}
    train = [path for i, path in enumerate(files) if i not in places]
    return Files(train, [files[i] for i in sorted(places)])


def _demo_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError("data.kind=demo needs the photos in scikit-image: install spark_me's group [demo]")
    return Path(spec.origin).parent / "data"
