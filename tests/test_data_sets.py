"""`spark-me data fetch`: sets of real images as class folders, with near copies on one side of their split."""

import fcntl
import io
import json
import os
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spark_me import cli
from spark_me.config.tasks import FinetuneConfig
from spark_me.data import sets
from spark_me.data.class_folders import find_labelled

ROWS = [("mono", 60), ("poly", 180), ("mono", 130), ("poly", 60), ("mono", 180), ("poly", 70)]
"""Crystal types and lengths of the rows of solar cells; in those of 130 and 70 cells are missing."""
PROBABILITIES = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")
PICTURES = "package/img/google/64/"
LIST = "package/emoji.json"


def png(value: int) -> bytes:
    """A different picture for each number, with alpha."""
    file = io.BytesIO()
    Image.new("RGBA", (2, 2), (value % 256, value // 256, 0, 128)).save(file, format="png")
    return file.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main(["data", "fetch", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package laid out as elpv-dataset, which must not be imported."""
    folder = tmp_path / "site" / "elpv_dataset"
    (folder / "data" / "images").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    lines = []
    for crystal in (crystal for crystal, number in ROWS for _ in range(number)):
        place = len(lines)
        name = f"images/cell{place + 1:04d}.png"
        (folder / "data" / name).write_bytes(png(place))
        lines.append(f"{name}  {PROBABILITIES[place % 4]}    {crystal}\n")
    (folder / "data" / "labels.csv").write_text("".join(lines))
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "elpv_dataset", raising=False)
    return folder / "data"


def entry(unified: str, category: str, *tones: str) -> dict:
    each = {"unified": unified, "image": f"{unified.lower()}.png"}
    variations = {
        tone: {"unified": f"{unified}-{tone}", "image": f"{unified.lower()}-{tone.lower()}.png"} for tone in tones
    }
    return each | {"category": category} | ({"skin_variations": variations} if tones else {})


RUNNERS = [
    entry("1F3C3", "People & Body", "1F3FB", "1F3FF"),
    entry("1F3C3-200D-2640-FE0F", "People & Body"),
    entry("1F468-200D-1F33E", "People & Body", "1F3FD"),
    entry("1F9D1-200D-1F33E", "People & Body"),
]
SAME = ("1f1f3-1f1f4.png", "1f1e7-1f1fb.png")
"""Flags that are drawn alike."""
CATALOGUE = [
    *RUNNERS,
    *(entry(f"1F4{place:02X}", "People & Body", "1F3FB", "1F3FC") for place in range(20)),
    *(entry(f"1F6{place:02X}", "Travel & Places") for place in range(16)),
    *(entry(f"1F1{place:02X}", "Flags") for place in range(6)),
    *(entry(name.removesuffix(".png").upper(), "Flags") for name in SAME),
    entry("2640", "Symbols"),
    entry("2642", "Symbols"),
    entry("1F300", "Symbols"),
    entry("1F301", "Symbols"),
]


def names_of(catalogue: list[dict]) -> list[str]:
    return [each["image"] for one in catalogue for each in (one, *one.get("skin_variations", {}).values())]


def tarball(path: Path, catalogue: object = CATALOGUE, more: dict[str, bytes] | None = None, last: str = LIST) -> Path:
    """A tarball laid out as npm's, with its list behind the pictures."""
    pictures = {name: png(9999 if name in SAME else place) for place, name in enumerate(names_of(CATALOGUE))}
    content = {f"{PICTURES}{name}": picture for name, picture in pictures.items()}
    content |= {"package/img/google/sheets/64.png": b"large"} | (more or {})
    content[last] = catalogue if isinstance(catalogue, bytes) else json.dumps(catalogue).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sides_of(folder: Path) -> dict[str, str]:
    """The part that each file is in; none is in both."""
    paths = list(folder.rglob("*.png"))
    sides = {path.name: path.relative_to(folder).parts[0] for path in paths}
    assert len(sides) == len(paths) and set(sides.values()) == {"train", "val"}
    return sides


def test_solar_modules_are_whole_on_one_side(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "elpv"
    assert cli.main(["data", "fetch", "elpv", str(folder)]) == 0
    said = capsys.readouterr().out
    sides = sides_of(folder)
    assert len(sides) == sum(number for _, number in ROWS)
    place, held_out = 0, defaultdict(int)
    for crystal, number in ROWS:
        module = 60 if number % 60 == 0 else number
        for start in range(place, place + number, module):
            own = {sides[f"{crystal}_cell{cell + 1:04d}.png"] for cell in range(start, start + module)}
            assert len(own) == 1, "a module is on both sides"
            held_out[crystal] += module * (own == {"val"})
        place += number
    assert held_out == {"mono": 60, "poly": 60}, "whole modules, up to a quarter of each type"
    for path in folder.rglob("*.png"):
        cell = int(path.stem[-4:]) - 1
        assert path.parent.name == ("functional" if cell % 4 < 2 else "defective")
        assert path.read_bytes() == png(cell)
    assert "CC BY-NC-SA 4.0" in said and "elpv-dataset" in said
    assert "680 images" in said and "train+val 560+120: defective 280+60, functional 280+60" in said
    assert f"spark-me finetune configs/finetune/small.yaml weights=WEIGHTS data.root={folder}" in said


def test_variants_of_an_emoji_are_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, folder = tarball(tmp_path / "emoji.tgz"), tmp_path / "emoji"
    assert cli.main(["data", "fetch", "emoji", str(folder), "--from", str(archive)]) == 0
    said = capsys.readouterr().out
    sides = sides_of(folder)
    assert sides.keys() == set(names_of(CATALOGUE)), "all that the list names, and nothing else"
    families = [names_of([one]) for one in CATALOGUE[len(RUNNERS) :]]
    families += [names_of(RUNNERS[:2]), names_of(RUNNERS[2:]), list(SAME)]
    for family in families:
        assert len({sides[name] for name in family}) == 1, family
    classes = {"flags", "people_and_body", "symbols", "travel_and_places"}
    for part in ("train", "val"):
        assert {path.name for path in (folder / part).iterdir()} == classes
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            assert image.mode == "RGBA" and image.getpixel((0, 0))[3] == 128
    assert "Apache 2.0" in said and "travel_and_places 12+4" in said and "symbols 3+1" in said


def test_the_same_files_again(cells: Path, tmp_path: Path) -> None:
    for name, options in (("elpv", []), ("emoji", ["--from", str(tarball(tmp_path / "emoji.tgz"))])):
        first, second = tmp_path / f"{name}1", tmp_path / f"{name}2"
        for folder in (first, second):
            assert cli.main(["data", "fetch", name, str(folder), *options]) == 0
        assert tree(first) == tree(second)


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, module, package in (
        ("elpv", "elpv_dataset", "elpv-dataset"),
        ("texture", "skimage", "scikit-image"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        line = error_of(capsys, name, tmp_path / "new")
        assert f"pip install {package}" in line and 'pip install -e ".[evidence]"' in line
    monkeypatch.setenv("PATH", str(tmp_path))
    line = error_of(capsys, "emoji", tmp_path / "new")
    assert "npm" in line and sets.EMOJI_PACK in line and "--from" in line
    assert not (tmp_path / "new").exists()


def test_npm_packs_the_emoji(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, npm = tarball(tmp_path / "emoji.tgz"), tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\ncp "{archive}" .\necho "$@" >"{tmp_path}/arguments"\n')
    npm.chmod(0o755)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    assert cli.main(["data", "fetch", "emoji", str(tmp_path / "emoji")]) == 0
    assert (tmp_path / "arguments").read_text().startswith("pack emoji-datasource-google@16.0.0 --ignore-scripts")
    assert not list((tmp_path / "temporary").iterdir()), "the tarball is deleted"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND\n\nnpm error network' >&2; exit 1\n")
    line = error_of(capsys, "emoji", tmp_path / "again")
    assert "npm error code ENOTFOUND npm error network" in line and sets.EMOJI_PACK in line


def test_the_folder_must_be_empty(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    assert "is not empty" in error_of(capsys, "elpv", folder)
    assert tree(folder) == {"mine": b"kept"}
    assert "is a file" in error_of(capsys, "elpv", folder / "mine")
    (folder / "mine").unlink()
    (tmp_path / "link").symlink_to(folder)
    assert cli.main(["data", "fetch", "elpv", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and sides_of(folder)


def test_from_is_for_emoji(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--from" in error_of(capsys, "elpv", tmp_path / "new", "--from", "x.tgz")


def test_nothing_is_left_half_done(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "sets"
    place.mkdir()
    mine, killed, running = (place / name for name in ("mine", f".{'a' * 16}.tmp.elpv", f".{'b' * 16}.tmp.elpv"))
    for folder in (mine, killed, running):
        folder.mkdir()
        (folder / "file").write_text("x")
    descriptor = os.open(running, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    last = cells / "images" / f"cell{sum(number for _, number in ROWS):04d}.png"
    content = last.read_bytes()
    last.unlink()
    assert "cannot be read" in error_of(capsys, "elpv", place / "elpv")
    assert set(place.iterdir()) == {mine, running}, "what a killed process left is gone, what another one writes is not"
    last.write_bytes(content)
    assert cli.main(["data", "fetch", "elpv", str(place / "elpv")]) == 0
    assert set(place.iterdir()) == {mine, running, place / "elpv"}
    os.close(descriptor)


def _cut_off(path: Path) -> None:
    path.write_bytes(tarball(path).read_bytes()[:-200])


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (_cut_off, "is no whole tarball"),
    "no tarball": (lambda path: path.write_bytes(b"x" * 2000), "is no whole tarball"),
    "missing": (lambda path: None, "No such file"),
    "no list": (lambda path: tarball(path, last="package/other.json"), "none of the pictures"),
    "no JSON": (lambda path: tarball(path, b"{"), "is no whole tarball"),
    "deep JSON": (lambda path: tarball(path, b"[" * 200_000), "is no whole tarball"),
    "another list": (lambda path: tarball(path, [{"image": "1f400.png"}]), "is no list of emoji"),
    "no entries": (lambda path: tarball(path, ["1f400.png"]), "is no list of emoji"),
    "outside": (lambda path: tarball(path, more={f"{PICTURES}../../../../evil.png": png(1)}), "code points"),
    "hidden": (lambda path: tarball(path, more={f"{PICTURES}%2e%2e%2fevil.png": png(1)}), "code points"),
    "other file": (lambda path: tarball(path, more={f"{PICTURES}1f400.sh": b"x"}), "code points"),
    "too large": (lambda path: tarball(path, more={f"{PICTURES}1f400.png": b"x" * 70_000}), "at most"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tarball_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = DAMAGED[case]
    make(tmp_path / "emoji.tgz")
    line = error_of(capsys, "emoji", tmp_path / "sets" / "emoji", "--from", tmp_path / "emoji.tgz")
    assert expected in line and "emoji.tgz" in line
    assert {path.name for path in tmp_path.iterdir()} <= {"emoji.tgz"}


def test_names_in_the_list_lead_nowhere(tmp_path: Path) -> None:
    """Neither classes nor pictures, and neither do links."""
    catalogue = [*CATALOGUE, *(entry(f"1F4{place:02X}", "../../..//Évil\n") for place in range(4))]
    catalogue.append(entry("1F4FF", "Flags") | {"image": "../../../../evil.png"})
    archive = tarball(tmp_path / "plain.tgz", catalogue)
    with tarfile.open(archive) as old, tarfile.open(tmp_path / "emoji.tgz", "w:gz") as new:
        for member in old:
            new.addfile(member, old.extractfile(member))
        link = tarfile.TarInfo(f"{PICTURES}1f4ff.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        new.addfile(link)
    folder = tmp_path / "sets" / "emoji"
    assert cli.main(["data", "fetch", "emoji", str(folder), "--from", str(tmp_path / "emoji.tgz")]) == 0
    assert "1f4ff.png" not in sides_of(folder)
    assert {path.name for path in folder.glob("*/*")} >= {"vil", "flags"}
    assert {path.name for path in tmp_path.rglob("*") if not path.is_relative_to(folder)} == {
        "plain.tgz", "emoji.tgz", "sets",
    }  # fmt: skip


def test_tiles_are_of_separate_parts_of_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skimage = pytest.importorskip("skimage")
    folder = tmp_path / "texture"
    assert cli.main(["data", "fetch", "texture", str(folder)]) == 0
    config = FinetuneConfig().data
    config.root = str(folder)
    train, val, classes = find_labelled(config, seed=0)
    assert classes == [Path(name).stem for name in sets.PHOTOS]
    assert "CC0 or public domain" in capsys.readouterr().out
    for label, name in enumerate(sets.PHOTOS):
        with Image.open(Path(skimage.__file__).parent / "data" / name) as photo:
            pixels = np.asarray(photo)
        right, places = [], set()
        for part in (train, val):
            own = [path for path, each in zip(part.paths, part.labels) if each == label]
            for path in own:
                left, top = (int(number[1:]) for number in path.stem.split("_"))
                with Image.open(path) as tile:
                    assert (np.asarray(tile) == pixels[top : top + 64, left : left + 64]).all()
                places.add((left, top))
            lefts = [int(path.stem[1:5]) for path in own]
            right.append((min(lefts), max(lefts) + 64))
        assert right[0][1] + 64 <= right[1][0], "a tile's width lies between the parts"
        assert len(places) == sum(each == label for part in (train, val) for each in part.labels)
        assert all(left % 64 == top % 64 == 0 for left, top in places), "tiles do not overlap"
    pictures = [{path.read_bytes() for path in part.paths} for part in (train, val)]
    assert not pictures[0] & pictures[1], "no tile is on both sides"
