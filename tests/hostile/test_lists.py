"""Lists of files that are damaged, and folders and files that may not be read."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from child import MIB, run_limited
from mutations import mutate
from PIL import Image
from tar_shards import png, write_shard

from spark_me.config.data import DataConfig, FinetuneDataConfig
from spark_me.data.class_folders import find_val
from spark_me.data.commands import examine
from spark_me.data.files import find_files
from spark_me.data.listing import class_folders
from spark_me.downstream.images import find_images
from spark_me.errors import UserError


@pytest.fixture
def folder() -> Iterator[Path]:
    """Images in a place that everybody may read, which pytest's is not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        for image in ("images/a/1.png", "images/b/2.png", "images/b/deep/3.png", "outside/in/4.png"):
            path = Path(name, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
        yield Path(name, "images")
        for closed in (name, f"{name}/images", f"{name}/outside", f"{name}/images/b", f"{name}/images/b/deep"):
            os.chmod(closed, 0o755)


def check_mutations(folder: Path, seeds: range) -> None:
    listing = folder / "list.txt"
    content = "\n".join(["a/1.png", "b/2.png", str(folder / "b/deep/3.png"), "café.png", "", "none.png"] * 3).encode()

    def read_all() -> None:
        for seed in seeds:
            listing.write_bytes(mutate(content, seed))
            try:
                images = find_files(DataConfig(kind="list", root=str(listing))).train
            except UserError as error:
                assert len(str(error).splitlines()) == 1
                continue
            for image in list(images)[:4]:
                why = examine(image, 3, DataConfig()).reason
                assert why is None or len(why.splitlines()) == 1

    run_limited(read_all, memory=256 * MIB, seconds=600)


def test_mutations(folder: Path) -> None:
    check_mutations(folder, range(400))


@pytest.mark.slow
def test_ten_thousand_mutations(folder: Path) -> None:
    check_mutations(folder, range(1000, 11_000))


def test_a_list_of_one_endless_line(folder: Path) -> None:
    (folder / "list.txt").write_bytes(b"x/" * MIB)
    images = find_files(DataConfig(kind="list", root=str(folder / "list.txt"))).train
    why = examine(images[0], 3, DataConfig()).reason
    assert why is not None and why.startswith("OSError: File name too long")


# What may not be read.


def looks(root: Path) -> dict[str, Callable[[], object]]:
    """Every way to look for images in a folder."""
    return {
        "images": lambda: find_files(DataConfig(kind="images", root=str(root))),
        "imagefolder": lambda: find_files(DataConfig(kind="imagefolder", root=str(root))),
        "classes": lambda: class_folders(root),
        "labelled": lambda: find_val(FinetuneDataConfig(val_root=str(root))),
        "predict": lambda: find_images([root]),
    }


def as_nobody(function: Callable[[], object]) -> str:
    """The line of a `UserError`, for somebody who has no rights."""

    def call() -> str:
        try:
            return f"found {function()}"
        except UserError as error:
            return str(error)

    return run_limited(call, root=False)


def assert_named(function: Callable[[], object], path: Path) -> None:
    line = as_nobody(function)
    assert len(line.splitlines()) == 1 and line.startswith(f"{path}: ") and "(Permission denied)" in line, line


@pytest.mark.parametrize("way", ["images", "imagefolder", "classes", "labelled", "predict"])
@pytest.mark.parametrize(("closed", "named"), [("b", "b"), ("b/deep", "b/deep"), (".", ""), ("..", "")])
def test_folders_without_permission_are_named(folder: Path, way: str, closed: str, named: str) -> None:
    os.chmod(folder / closed, 0)
    assert_named(looks(folder)[way], folder / named)


@pytest.mark.parametrize("way", ["images", "imagefolder", "classes", "labelled", "predict"])
@pytest.mark.parametrize("target", ["outside", "outside/in"])
@pytest.mark.parametrize("link", ["link", "a/link"])
def test_links_into_closed_folders_are_named(folder: Path, way: str, target: str, link: str) -> None:
    (folder / link).symlink_to(folder.parent / target)
    os.chmod(folder.parent / "outside", 0)
    assert_named(looks(folder)[way], folder / link)


def test_files_without_permission_are_one_line(folder: Path) -> None:
    image, listing, shard = folder / "a/1.png", folder / "list.txt", folder / "a.tar"
    listing.write_text("a/1.png\n")
    write_shard(shard, {"a.png": png(1)})
    for path in (image, listing, shard):
        path.chmod(0)
    assert (
        run_limited(lambda: examine(image, 3, DataConfig()).reason, root=False) == "PermissionError: Permission denied"
    )
    assert_named(lambda: find_files(DataConfig(kind="list", root=str(listing))), listing)
    assert_named(lambda: find_files(DataConfig(kind="webdataset", root=str(shard))), shard)
    os.chmod(folder, 0)
    for kind, path in (("list", listing), ("webdataset", shard), ("imagenet", folder / "train")):
        root = path.parent if kind == "imagenet" else path
        assert_named(lambda kind=kind, root=root: find_files(DataConfig(kind=kind, root=str(root))), path)  # type: ignore[misc]


def test_an_image_that_is_a_link_into_a_closed_folder_is_unreadable(folder: Path) -> None:
    (folder / "a/link.png").symlink_to(folder.parent / "outside/in/4.png")
    os.chmod(folder.parent / "outside", 0)
    assert "link.png" in as_nobody(lambda: list(find_files(DataConfig(root=str(folder))).train))
    why = run_limited(lambda: examine(folder / "a/link.png", 3, DataConfig()).reason, root=False)
    assert why == "PermissionError: Permission denied"
