"""Which images a run reads: sorted lists of files, shards, or rows of a data set."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from spark_me.config_data import DataConfig
from spark_me.data import huggingface, shards
from spark_me.data.arrays import NEEDS_TIFFFILE, has_tifffile
from spark_me.data.reading import EXTENSIONS, MODES, TIFF, Items
from spark_me.errors import UserError, install_text

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


LOST_AND_FOUND = "lost+found"
"""The folder at the root of a disk that none but root may read; no images are in it."""


class Files(NamedTuple):
    """The images of a run."""

    train: Items | shards.Shards
    held_out: Items


def find_files(data: DataConfig, channels: int = 3) -> Files:
    """List the training and held-out images of a run.

    Raises:
        UserError: if they are missing or there are none, nothing is left to train on, or a package that reads images
            of so many channels or of that kind is missing.
    """
    if data.kind == "webdataset":
        return _find_shards(data)
    if data.kind == "huggingface":
        return _find_rows(data)
    train, held_out = _find_paths(data)
    tiffs = [path for path in (*train, *held_out) if path.suffix.lower() in TIFF]
    if tiffs and channels not in MODES and not has_tifffile():
        raise UserError(f"{tiffs[0]}: with {channels} channels it {NEEDS_TIFFFILE}")
    return Files(train, held_out)


def fingerprint(images: Items | shards.Shards) -> str:
    """A digest of the images' number, order and names, to notice that a data set changed under a run."""
    if isinstance(images, list):
        names = [f"{path.parent.name}/{path.name}" for path in images]
    elif isinstance(images, shards.Shards):
        names = images.urls
    else:
        assert isinstance(images, huggingface.HuggingFaceImages)
        names = [images.name, images.column]
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
    return f"{len(images)} {'files' if isinstance(images, list) else 'images'}, {digest}"


def _find_paths(data: DataConfig) -> tuple[list[Path], list[Path]]:
    if data.kind == "demo":
        folder = _demo_folder()
        return [folder / name for name in DEMO_PHOTOS], [folder / name for name in DEMO_HELD_OUT]
    root = Path(str(data.root))
    if data.kind == "imagenet":
        return _find_imagenet(root, data.held_out)
    files = _list_images(data.kind, root, "data.root")
    if data.val_root is not None:
        return files, _list_images(data.kind, Path(data.val_root), "data.val_root")
    train, held_out = _hold_out(len(files), data.held_out)
    return [files[place] for place in train], [files[place] for place in held_out]


def _find_imagenet(root: Path, held_out: int) -> tuple[list[Path], list[Path]]:
    if not (root / "train").is_dir():
        raise UserError(f"data.root={root}: has no folder train: data.kind=imagenet wants the one above train and val")
    train = _list_images("imagefolder", root / "train", "data.root")
    # The validation images come without class folders.
    val = _list_images("images", root / "val", "data.root") if (root / "val").is_dir() else []
    if held_out > len(val):
        raise UserError(f"data.held_out={held_out} is more than the {len(val)} images in {root / 'val'}: lower it")
    return train, [val[place] for place in evenly_spaced(len(val), held_out)] if held_out else val


def _find_shards(data: DataConfig) -> Files:
    urls = shards.expand(str(data.root), "data.root")
    samples = data.samples if data.samples is not None else len(shards.TarImages(urls, data.image_key))
    if not samples:
        raise UserError(f"data.root={data.root}: no images in these shards: check data.image_key={data.image_key}")
    if data.val_root is None:
        return Files(shards.Shards(urls, samples, data.image_key), [])
    held_out = shards.TarImages(shards.expand(data.val_root, "data.val_root"), data.image_key)
    return Files(shards.Shards(urls, samples, data.image_key), held_out)


def _find_rows(data: DataConfig) -> Files:
    images = huggingface.load(data, data.split)
    if data.val_split is not None:
        return Files(images, huggingface.load(data, data.val_split))
    train, held_out = _hold_out(len(images), data.held_out)
    return Files(images.select(train), images.select(held_out))


def _list_images(kind: str, root: Path, key: str) -> list[Path]:
    finders = {"images": walk, "imagefolder": _in_class_folders, "list": _read_list}
    expected = "text file" if kind == "list" else "folder"
    if not (root.is_file() if kind == "list" else root.is_dir()):
        raise UserError(f"{key}={root}: no such {expected}: give the path of your images (data.kind={kind})")
    files = sorted(finders[kind](root))
    if not files:
        raise UserError(f"{key}={root}: no images in there ({', '.join(EXTENSIONS)}): check the path or data.kind")
    return files


def walk(root: Path) -> Iterator[Path]:
    """The image files in a folder, at any depth, in no order.

    Raises:
        UserError: naming a folder that cannot be read: its images would be missing unnoticed.
    """
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        if LOST_AND_FOUND in folders:
            folders.remove(LOST_AND_FOUND)
        yield from (Path(folder, name) for name in names if name.lower().endswith(EXTENSIONS))


def class_folders(root: Path) -> dict[str, list[Path]]:
    """The images in each folder of a folder, those in its own folders too; both in order, as torchvision's ImageFolder.

    Raises:
        UserError: naming a folder that cannot be read.
    """
    try:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name != LOST_AND_FOUND)
    except OSError as error:
        _refuse_folder(error)
    return {name: sorted(walk(root / name), key=lambda path: (str(path.parent), path.name)) for name in classes}


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: this folder cannot be read ({error.strerror}): make it readable, or move it elsewhere"
    )


def _in_class_folders(root: Path) -> Iterator[Path]:
    images = class_folders(root)
    if not images:
        raise UserError(f"{root}: has no class folders: use data.kind=images for images without labels")
    yield from (path for own in images.values() for path in own)


def _read_list(path: Path) -> Iterator[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no UTF-8 text: data.kind=list wants one image path a line") from None
    yield from (path.parent / line.strip() for line in lines if line.strip())


def _hold_out(images: int, count: int) -> tuple[list[int], list[int]]:
    """Which of so many images are trained on, and which are held out."""
    if count >= images:
        raise UserError(f"data.held_out={count} leaves none of {images} images to train on: lower it")
    held_out = evenly_spaced(images, count)
    return sorted(set(range(images)).difference(held_out)), held_out


def evenly_spaced(images: int, count: int) -> list[int]:
    """So many different places among images, so that those sorted by class or by time are represented alike."""
    return [(2 * i + 1) * images // (2 * count) for i in range(count)]


def _demo_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError(f"data.kind=demo needs the photos in scikit-image: {install_text('demo')}")
    return Path(spec.origin).parent / "data"
