"""Which images a run reads: sorted lists of files, shards, or rows of a data set."""

import codecs
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spark_me.config.data import DataConfig
from spark_me.data import shards
from spark_me.data.arrays import NEEDS_TIFFFILE, has_tifffile
from spark_me.data.listing import Paths, is_there, list_class_folders, list_images
from spark_me.data.reading import MODES, TIFF, Encoded, Item, Items
from spark_me.errors import UserError, install_text

SAFE_VERSION = 4
"""Of `datasets`: the first that knows no scripts."""


class HuggingFaceImages:
    """One column of one split."""

    def __init__(self, rows: Any, column: str, name: str, folders: Sequence[Path] = ()) -> None:
        """
        Args:
            rows: a `datasets.Dataset`.
            column: of images or of arrays [H, W, C].
            name: what to call it.
            folders: those whose files a row may name in place of an image's bytes.
        """
        self.folders = folders
        self.rows = rows
        self.column = column
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Item:
        value = self.rows[index][self.column]
        name = f"{self.name}[{index}]"
        if isinstance(value, dict):  # an image, encoded
            path = value["path"] or ""
            if value["bytes"] is not None:
                return Encoded(f"{name}/{path}", value["bytes"])
            place = Path(os.path.abspath(path))
            if path and any(place.is_relative_to(folder) for folder in self.folders):
                return place
            # A stranger's rows may name any file of this machine.
            return Encoded(f"{name} (no bytes, and no file of the data set: {path})", b"")
        return Encoded(name, np.asarray(value))

    def select(self, indices: list[int]) -> "HuggingFaceImages":
        """Some of the rows."""
        return HuggingFaceImages(self.rows.select(indices), self.column, self.name, self.folders)


def load(data: DataConfig, split: str) -> HuggingFaceImages:
    """The images of one split.

    Raises:
        UserError: if the package is missing, there is no such data set, split or column.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"data.kind=huggingface needs datasets: {install_text('huggingface')}") from None
    if int(datasets.__version__.partition(".")[0]) < SAFE_VERSION:
        raise UserError(
            f"datasets {datasets.__version__} may run a data set's own script, from {SAFE_VERSION} on it does not: "
            f"{install_text('huggingface')}"
        )
    root = str(data.root)
    try:
        if Path(root, "dataset_dict.json").is_file() or Path(root, "state.json").is_file():
            loaded = datasets.load_from_disk(root)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(root, split=split)
        rows.data.validate(full=True)  # of damaged offsets, reading makes whatever is in memory
    except Exception as error:  # a damaged one raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.root={root}: no such data set or split {split} ({reason}): check the name") from None
    column = data.image_key or _first_image(rows.features, datasets.Image)
    if column is None or column not in rows.features:
        columns = ", ".join(rows.features)
        raise UserError(f"data.root={root}: which column is the image? set data.image_key to one of {columns}")
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    else:
        rows = rows.with_format("numpy", columns=[column])
    local = Path(root).is_dir()
    folders = [Path(os.path.abspath(root if local else datasets.config.HF_CACHE_HOME))]
    return HuggingFaceImages(rows.select_columns([column]), column, f"{root}/{split}", folders)


def _first_image(features: Any, image_type: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, image_type)), None)


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
    if channels not in MODES and not has_tifffile():
        for path in chain(train, held_out):
            if path.suffix.lower() in TIFF:
                raise UserError(f"{path}: with {channels} channels it {NEEDS_TIFFFILE}")
    return Files(train, held_out)


def fingerprint(images: Items | shards.Shards) -> str:
    """A digest of the images' number, order and names, to notice that a data set changed under a run.

    Contents are not compared, nor sizes and dates: a copy of the data set on another disk has other dates, and to ask a
    network drive about millions of files takes minutes at every start. Files that were swapped under unchanged names go
    unnoticed.
    """
    kind = "images"
    if isinstance(images, Paths | list):
        kind = "files"
        names = [f"{path.parent.name}/{path.name}" for path in images]
    elif isinstance(images, shards.Shards):
        names = images.urls
    else:
        assert isinstance(images, HuggingFaceImages)
        names = [images.name, images.column]
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
    return f"{len(images)} {kind}, {digest}"


def _find_paths(data: DataConfig) -> tuple[Paths, Paths]:
    if data.kind == "demo":
        folder = _demo_folder()
        return Paths(folder / name for name in DEMO_PHOTOS), Paths(folder / name for name in DEMO_HELD_OUT)
    root = Path(str(data.root))
    if data.kind == "imagenet":
        return _find_imagenet(root, data.held_out)
    files = _list_images(data.kind, root, "data.root")
    if data.val_root is not None:
        return files, _list_images(data.kind, Path(data.val_root), "data.val_root")
    train, held_out = _hold_out(len(files), data.held_out)
    return files.select(train), files.select(held_out)


def _find_imagenet(root: Path, held_out: int) -> tuple[Paths, Paths]:
    if not is_there(root / "train", folder=True):
        raise UserError(f"data.root={root}: has no folder train: data.kind=imagenet wants the one above train and val")
    train = _list_images("imagefolder", root / "train", "data.root")
    # The validation images come without class folders.
    val = _list_images("images", root / "val", "data.root") if is_there(root / "val", folder=True) else Paths()
    if held_out > len(val):
        raise UserError(f"data.held_out={held_out} is more than the {len(val)} images in {root / 'val'}: lower it")
    return train, val.select(evenly_spaced(len(val), held_out)) if held_out else val


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
    images = load(data, data.split)
    if data.val_split is not None:
        return Files(images, load(data, data.val_split))
    train, held_out = _hold_out(len(images), data.held_out)
    return Files(images.select(train), images.select(held_out))


def _list_images(kind: str, root: Path, key: str) -> Paths:
    finders = {"images": list_images, "imagefolder": list_class_folders, "list": _read_list}
    expected = "text file" if kind == "list" else "folder"
    if not is_there(root, folder=kind != "list"):
        raise UserError(f"{key}={root}: no such {expected}: give the path of your images (data.kind={kind})")
    files = Paths(finders[kind](root))
    if not files:
        raise UserError(f"{key}={root}: no images in there (what Pillow opens, or .npy): check the path or data.kind")
    return files


def _read_list(path: Path) -> list[Path]:
    # Names that are no UTF-8 are kept as the system has them; a mark of UTF-8 is no part of a name.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): make it readable") from None
    text = content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
    if "\0" in text:
        raise UserError(f"{path}: is no UTF-8 text: data.kind=list wants one image path a line")
    return sorted(path.parent / line.strip() for line in text.split("\n") if line.strip())


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
