"""Looking through folders: what is no image, links, FIFOs, and what is said of it."""

import os
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, features
from tar_shards import png, write_shard

from spark_me.config.data import DataConfig
from spark_me.data import listing, reading
from spark_me.data.commands import examine
from spark_me.data.files import find_files
from spark_me.data.listing import class_folders, list_images
from spark_me.data.reading import Encoded, read_image
from spark_me.data.shards import TarImages
from spark_me.data.unreadable import UnreadableImage
from spark_me.downstream.images import find_images
from spark_me.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, in the root and in a folder of their own."""
    root = tmp_path / "images"
    save(root / "a.png")
    save(root / "deep" / "b.jpg")
    return root


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def names(paths: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


# What is no image.

HIDDEN = (
    "._a.png",
    ".a.png",
    "deep/._b.jpg",
    ".thumbnails/a.png",
    "__MACOSX/a.png",
    "@eaDir/a.png",
    ".ipynb_checkpoints/a.png",
    "lost+found/a.png",
)


def test_hidden_files_and_folders_are_no_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in HIDDEN:
        save(folder / name)
    for kind in ("images", "imagefolder"):
        found = names(find_files(DataConfig(kind=kind, root=str(folder))).train, folder)
        assert found == ["a.png", "deep/b.jpg"][kind == "imagefolder" :]
    assert names(find_images([folder]), folder) == ["a.png", "deep/b.jpg"]
    assert list(class_folders(folder)) == ["deep"]
    line = capsys.readouterr().err.splitlines()[0]
    assert line == f"{folder}: skipped 8 hidden by their names, or the system's"
    # What the user names is taken, in whichever folder it lies.
    assert names(find_images([folder / ".a.png"]), folder) == [".a.png"]
    assert names(list_images(folder / ".thumbnails"), folder) == [".thumbnails/a.png"]


def test_hidden_members_of_shards_are_no_images(tmp_path: Path) -> None:
    members = {"./a.png": png(0), "./._a.png": b"x", "__MACOSX/a.png": b"x", ".trash/c.png": b"x", "b/d.png": png(1)}
    write_shard(tmp_path / "a.tar", members)
    data = DataConfig(kind="webdataset", root=str(tmp_path / "a.tar"), val_root=str(tmp_path / "a.tar"))
    files = find_files(data)
    assert len(files.train) == 2
    assert [image.content for image in files.train] == [png(0), png(1)]
    assert [files.held_out[place].content for place in range(len(files.held_out))] == [png(0), png(1)]


@pytest.mark.parametrize("suffix", [".gif", ".avif", ".tga", ".jp2", ".apng", ".mpo", ".ico", ".dds", ".PCX"])
def test_whatever_pillow_opens_is_an_image(folder: Path, suffix: str) -> None:
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    save(folder / f"c{suffix}")
    assert f"c{suffix}" in names(list_images(folder), folder)
    assert read_image(folder / f"c{suffix}", 3).size == (8, 8)


def test_first_frame_of_an_animation_is_the_image(folder: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "c.gif", save_all=True, append_images=frames[1:])
    assert read_image(folder / "c.gif", 3).getpixel((3, 3)) == (255, 0, 0)


def test_what_is_skipped_is_said_commonest_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, suffix in enumerate([".heic", ".TXT", ".txt", ".mpg", ".json", ".xmp", "", ".pdf", ".txt"]):
        (folder / "deep" / f"{number}{suffix}").touch()
    assert len(list_images(folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}: skipped 9 files of no format that is read (.txt 3, ")
    assert line.endswith(" and 2 more kinds)")
    os.environ["RANK"] = "1"
    try:
        list_images(folder)
    finally:
        del os.environ["RANK"]
    assert capsys.readouterr().err == ""


def test_no_file_is_handed_to_another_program(tmp_path: Path) -> None:
    """Pillow would call Ghostscript for PostScript, whatever its name."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    assert not reading.is_image("a.eps")
    with pytest.raises(UnreadableImage, match="no image of a known format"):
        read_image(Encoded("a.jpg", (tmp_path / "a.eps").read_bytes()), 3)


# Links.


def test_each_real_folder_is_visited_once(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "more" / "c.png")
    for name, target in {
        "0": "deep",  # sorted before what it leads to
        "deep/up": "..",
        "deep/up2": "../..",
        "self": ".",
        "system": "/",
        "x": tmp_path / "elsewhere",
        "y": tmp_path / "elsewhere" / "more",
        "z": tmp_path / "elsewhere",
    }.items():
        (folder / name).symlink_to(target)
    assert names(list_images(folder), folder) == ["a.png", "deep/b.jpg", "x/more/c.png"]
    (tmp_path / "link").symlink_to(folder)
    assert len(list_images(tmp_path / "link")) == 3


def test_images_of_a_class_are_its_own_wherever_links_lead(folder: Path, tmp_path: Path) -> None:
    save(folder / "other" / "c.png")
    (folder / "deep" / "up").symlink_to("..")
    (folder / "deep" / "sideways").symlink_to("../other")
    found = {name: names(paths, folder) for name, paths in class_folders(folder).items()}
    assert found == {"deep": ["deep/b.jpg"], "other": ["other/c.png"]}
    (folder / "again").symlink_to("other")
    assert names(find_files(DataConfig(kind="imagefolder", root=str(folder))).train, folder) == [
        "deep/b.jpg",
        "other/c.png",
    ]
    with pytest.raises(UserError, match="other: this class is the same folder as again: remove one of them"):
        class_folders(folder)


# What is no file.


@pytest.fixture
def no_files(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Paths by what they are."""
    places = {kind: tmp_path / "none" / f"{kind}.jpg" for kind in ("FIFO", "socket", "device", "folder", "loop")}
    places["FIFO"].parent.mkdir()
    os.mkfifo(places["FIFO"])
    places["device"].symlink_to("/dev/zero")
    places["folder"].mkdir()
    places["loop"].symlink_to(places["loop"])
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(places["socket"].parent, os.O_RDONLY)
        try:  # a socket's address holds some hundred characters
            server.bind(f"/proc/self/fd/{folder}/socket.jpg")
        finally:
            os.close(folder)
        yield places


def test_what_is_no_file_is_unreadable_and_never_waited_for(no_files: dict[str, Path]) -> None:
    root = no_files["FIFO"].parent
    assert {path.stem for path in list_images(root)} == {"FIFO", "socket", "device", "loop"}
    for kind, path in no_files.items():
        for channels in (1, 3, 5):
            for suffix in (".jpg", ".npy", ".tif"):
                path = path.rename(path.with_suffix(suffix)) if kind != "loop" else path
                reason = examine(path, channels, DataConfig()).reason
                assert reason is not None and "\n" not in reason
                assert f"is a {kind}, not a file" in reason or kind == "loop"


def test_a_fifo_is_no_list_and_no_shard(no_files: dict[str, Path]) -> None:
    fifo = str(no_files["FIFO"])
    with pytest.raises(UserError, match="no such text file"):
        find_files(DataConfig(kind="list", root=fifo))
    with pytest.raises(UserError, match="no such file"):
        find_files(DataConfig(kind="webdataset", root=fifo))


def test_member_of_a_shard_that_is_a_fifo_is_no_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("a.png", tarfile.FIFOTYPE), ("b.png", tarfile.CHRTYPE), ("c.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert len(TarImages([str(tmp_path / "a.tar")])) == 0


# Lists.


def test_list_holds_names_that_are_no_utf8_and_a_mark_of_its_encoding(folder: Path) -> None:
    odd = folder / os.fsdecode(b"caf\xe9.png")
    save(odd)
    listing = folder / "list.txt"
    listing.write_bytes(b"\xef\xbb\xbfa.png\r\ncaf\xe9.png\n\n")
    assert find_files(DataConfig(kind="list", root=str(listing))).train == [folder / "a.png", odd]


# Slow scans.


def test_slow_scans_say_where_they_are(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(folder / "0.tar", {"a.png": png(0)})
    list_images(folder)
    TarImages([str(folder / "0.tar")])
    assert "looking" not in (quick := capsys.readouterr().err) and "counting" not in quick
    clock = iter(range(1000))
    monkeypatch.setattr(listing.time, "monotonic", lambda: float(next(clock)))
    for number in range(20):
        (folder / f"x{number}.png").touch()
    assert len(list_images(folder)) == 22
    lines = [line for line in capsys.readouterr().err.splitlines() if "looking" in line]
    assert [line.partition(" (")[2] for line in lines] == ["3 s so far)", "5 s so far)", "9 s so far)", "17 s so far)"]
    assert all(f"{folder}: looking for images, " in line and f"now in {folder}" in line for line in lines)
    TarImages([str(folder / "0.tar")] * 4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"counting the images of 4 shards: 2 read, now {folder}/0.tar (3 s so far)"
