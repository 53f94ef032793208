"""Images of a Hugging Face data set, read row by row."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spark_me.config_data import DataConfig
from spark_me.data.reading import Encoded, Item
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
