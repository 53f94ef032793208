"""Hugging Face data sets that lie on the disk."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from spark_me.config.data import DataConfig
from spark_me.data.files import HuggingFaceImages, find_files, fingerprint
from spark_me.data.reading import read_image
from spark_me.data.unreadable import UnreadableImage
from spark_me.errors import UserError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(6)]
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    rows = datasets.Dataset.from_dict({"label": list(range(6)), "picture": photos}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select([4, 1])}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_rows_are_images(saved: Path) -> None:
    files = find_files(DataConfig(kind="huggingface", root=str(saved), val_split="test"))
    assert (len(files.train), len(files.held_out)) == (6, 2)
    rows = datasets.load_from_disk(str(saved))["train"]
    for number in range(6):
        image = read_image(files.train[number], 3)
        assert np.array_equal(np.asarray(image), np.asarray(rows[number]["picture"]))
    assert np.array_equal(np.asarray(read_image(files.held_out[0], 3)), np.asarray(rows[4]["picture"]))
    assert f"{saved}/train[2]" in str(files.train[2])


def test_some_rows_are_held_out(saved: Path) -> None:
    files = find_files(DataConfig(kind="huggingface", root=str(saved), held_out=2))
    rows = datasets.load_from_disk(str(saved))["train"]
    held = [np.asarray(read_image(files.held_out[place], 3)) for place in range(2)]
    assert all(np.array_equal(held[place], np.asarray(rows[row]["picture"])) for place, row in enumerate((1, 4)))
    assert len(files.train) == 4


def test_columns_of_arrays(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((3, 8, 9, 5)).astype(np.float32)
    features = datasets.Features({"bands": datasets.Array3D((8, 9, 5), "float32")})
    datasets.Dataset.from_dict({"bands": list(array)}, features=features).save_to_disk(tmp_path / "saved")
    data = DataConfig(kind="huggingface", root=str(tmp_path / "saved"), image_key="bands")
    image = read_image(find_files(data).train[1], 5)
    assert torch.equal(image, torch.from_numpy(array[1]).permute(2, 0, 1))


def test_fingerprint_sees_another_split(saved: Path) -> None:
    splits = [
        find_files(DataConfig(kind="huggingface", root=str(saved), split=name)).train for name in ("train", "test")
    ]
    assert fingerprint(splits[0]) != fingerprint(splits[1])
    again = find_files(DataConfig(kind="huggingface", root=str(saved))).train
    assert fingerprint(again) == fingerprint(splits[0])


def test_bad_names(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="split other"):
        find_files(DataConfig(kind="huggingface", root=str(saved), split="other"))
    with pytest.raises(UserError, match="set data.image_key to one of label, picture"):
        find_files(DataConfig(kind="huggingface", root=str(saved), image_key="image"))
    with pytest.raises(UserError, match="no such data set"):
        find_files(DataConfig(kind="huggingface", root=str(saved / "nowhere")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e \"\.\[huggingface\]\"`"):
        find_files(DataConfig(kind="huggingface", root=str(saved)))


def test_versions_that_run_scripts_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(UserError, match="datasets 3.6.0 may run a data set's own script, from 4 on it does not"):
        find_files(DataConfig(kind="huggingface", root=str(saved)))


def test_rows_name_files_of_the_data_set_alone(tmp_path: Path) -> None:
    inside, outside = tmp_path / "saved" / "photos" / "a.png", tmp_path / "outside.png"
    inside.parent.mkdir(parents=True)
    for path in (inside, outside):
        Image.new("RGB", (8, 9)).save(path)
    paths = [str(inside), str(outside), f"{tmp_path}/saved/../outside.png", "/etc/passwd", None]
    rows = [{"picture": {"bytes": None, "path": path}} for path in paths]
    images = HuggingFaceImages(rows, "picture", "name", [tmp_path / "saved"])
    assert read_image(images[0], 3).size == (8, 9)
    for number in range(1, 5):
        assert "no file of the data set" in str(images[number])
        with pytest.raises(UnreadableImage):
            read_image(images[number], 3)
