"""Listing images: every kind of data set, what is held out, and bad places."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from spark_me.config.data import DataConfig
from spark_me.data.files import find_files, fingerprint
from spark_me.data.listing import class_folders
from spark_me.data.reading import read_image
from spark_me.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.png", "b/deep/er/3.JPG", "a/1.jpeg", "0.webp"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def names(files: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in files]


def test_images_at_any_depth(folder: Path) -> None:
    files = find_files(DataConfig(kind="images", root=str(folder)))
    assert names(files.train, folder) == ["0.webp", "a/1.jpeg", "b/2.png", "b/deep/er/3.JPG"]
    assert files.held_out == []


def test_imagefolder_takes_class_folders_alone(folder: Path) -> None:
    files = find_files(DataConfig(kind="imagefolder", root=str(folder)))
    assert names(files.train, folder) == ["a/1.jpeg", "b/2.png", "b/deep/er/3.JPG"]


def test_list_is_relative_to_its_file(folder: Path) -> None:
    listing = folder / "list.txt"
    listing.write_text(f"b/2.png\n\n{folder}/0.webp\n")
    files = find_files(DataConfig(kind="list", root=str(listing)))
    assert names(files.train, folder) == ["0.webp", "b/2.png"]


def test_demo_photos_are_in_the_wheel_and_readable() -> None:
    files = find_files(DataConfig(kind="demo"))
    assert (len(files.train), len(files.held_out)) == (14, 2)
    assert not set(files.train) & set(files.held_out)
    for path in files.train + files.held_out:
        assert min(read_image(path, 3).size) >= 256


@pytest.mark.parametrize("kind", ["images", "imagefolder"])
def test_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    closed, scan = folder / "b" / "deep", os.scandir

    def refuse(path: str | Path) -> object:  # as root, nothing is unreadable
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"^{closed}: this folder cannot be read \(Permission denied\)"):
        find_files(DataConfig(kind=kind, root=str(folder)))
    closed.rename(folder / "b" / "lost+found")  # every disk has one
    closed = folder / "b" / "lost+found"
    files = find_files(DataConfig(kind=kind, root=str(folder))).train
    assert "b/2.png" in names(files, folder) and not any("3.JPG" in str(path) for path in files)


def test_class_folders_are_those_of_torchvision(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "b" / "deep" / "1.png")
    Image.new("RGB", (8, 8)).save(folder / "b" / "z.png")
    expected = [Path(path) for path, _ in torchvision.datasets.ImageFolder(folder).samples]
    assert find_files(DataConfig(kind="imagefolder", root=str(folder))).train == sorted(expected)
    assert [path for paths in class_folders(folder).values() for path in paths] == expected


def test_held_out_images_are_spread_and_not_trained_on(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    files = find_files(DataConfig(root=str(tmp_path), held_out=2))
    assert names(files.held_out, tmp_path) == ["2.png", "7.png"]
    assert names(files.train, tmp_path) == [f"{n}.png" for n in range(10) if n not in (2, 7)]


def test_validation_folder(folder: Path) -> None:
    files = find_files(DataConfig(root=str(folder / "b"), val_root=str(folder / "a")))
    assert names(files.held_out, folder) == ["a/1.jpeg"]
    assert len(files.train) == 2


@pytest.mark.parametrize("kind", ["images", "imagefolder", "list"])
def test_missing_place(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="data.root=.*nowhere: no such"):
        find_files(DataConfig(kind=kind, root=str(tmp_path / "nowhere")))


def test_missing_validation_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="data.val_root=nowhere: no such folder"):
        find_files(DataConfig(root=str(folder), val_root="nowhere"))


@pytest.mark.parametrize("kind", ["images", "list"])
def test_empty_place(tmp_path: Path, kind: str) -> None:
    (tmp_path / "empty.txt").touch()
    root = tmp_path / "empty.txt" if kind == "list" else tmp_path
    with pytest.raises(UserError, match="no images in there"):
        find_files(DataConfig(kind=kind, root=str(root)))


def test_imagefolder_without_classes(folder: Path) -> None:
    shutil.rmtree(folder / "a")
    shutil.rmtree(folder / "b")
    with pytest.raises(UserError, match="has no class folders"):
        find_files(DataConfig(kind="imagefolder", root=str(folder)))


def test_list_that_is_no_text(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="no UTF-8 text"):
        find_files(DataConfig(kind="list", root=str(tmp_path / "a.png")))


def test_holding_out_everything(folder: Path) -> None:
    with pytest.raises(UserError, match="data.held_out=4 leaves none"):
        find_files(DataConfig(root=str(folder), held_out=4))


def test_fingerprint_sees_a_renamed_a_missing_and_a_swapped_file() -> None:
    files = [Path("x/a.png"), Path("x/b.png")]
    changed = [[Path("x/a.png")], [Path("x/a.png"), Path("x/c.png")], files[::-1]]
    assert fingerprint([Path("elsewhere/x/a.png"), Path("elsewhere/x/b.png")]) == fingerprint(files)
    assert len({fingerprint(other) for other in [files, *changed]}) == 4


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    names = [f"train/n0{c}/n0{c}_{i}.JPEG" for c in range(2) for i in range(3)]
    for name in (*names, *(f"val/ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 5))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def test_imagenet_trains_on_train_and_holds_out_val(imagenet: Path) -> None:
    files = find_files(DataConfig(kind="imagenet", root=str(imagenet)))
    assert (len(files.train), len(files.held_out)) == (6, 4)
    assert names(files.train, imagenet)[0] == "train/n00/n00_0.JPEG"
    some = find_files(DataConfig(kind="imagenet", root=str(imagenet), held_out=2)).held_out
    assert [path.stem[-1] for path in some] == ["2", "4"]
    with pytest.raises(UserError, match="data.held_out=5 is more than the 4 images"):
        find_files(DataConfig(kind="imagenet", root=str(imagenet), held_out=5))
    shutil.rmtree(imagenet / "val")
    assert find_files(DataConfig(kind="imagenet", root=str(imagenet))).held_out == []
    with pytest.raises(UserError, match="has no folder train"):
        find_files(DataConfig(kind="imagenet", root=str(imagenet / "train")))
