"""Writing: whole or not at all."""

import errno
import json
import os
from pathlib import Path
from urllib.parse import quote

import pytest

from spark_me.errors import UserError
from spark_me.files import (
    atomic_write,
    check_output,
    check_output_folder,
    file_in,
    is_file,
    plain_name,
    write_json,
    write_text,
    writing,
)


def test_replaces_the_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_previous_content_is_there_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug")])
def test_interruption_keeps_the_previous_content(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write(b"ne")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UserError, match="a.txt: cannot be written .No space left on device"), atomic_write(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old"


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "no" / "folder" / "a.txt", "new")


def test_an_error_of_another_kind_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), writing(tmp_path / "a.txt"):
        raise RuntimeError("a bug")


def test_output_that_cannot_be_or_is_an_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.pt"
    source.write_text("weights")
    (tmp_path / "link.pt").symlink_to(source)
    os.link(source, tmp_path / "hard.pt")
    check_output(tmp_path / "new.pt", source, "https://somewhere/a.pt")
    check_output(None, source)
    for same in (source, tmp_path / "link.pt", tmp_path / "hard.pt", tmp_path / "." / "a.pt"):
        with pytest.raises(UserError, match=f"{same}: would replace {source}, which is read"):
            check_output(same, source)
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="the folder .*no does not exist"):
        check_output(tmp_path / "no" / "a.pt")


def test_folder_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output_folder(tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UserError, match=f"^{path}: {tmp_path / 'file'} is a file, not a folder"):
            check_output_folder(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=f"the folder {tmp_path} is not writable"):
        check_output_folder(tmp_path / "new")
    with pytest.raises(UserError, match=f"the folder {tmp_path} is not writable"):
        check_output(tmp_path / "new.pt")


@pytest.mark.parametrize(
    "text, name",
    [
        ("weights.pth", "weights.pth"),
        ("/a/b/two words-é.pth", "two words-é.pth"),
        ("/a/b/100%25.pth", "100%.pth"),
        ("/a/..%2F..%2F.local%2Flib%2Fpython3.11%2Fsite-packages%2Fname.pth", "name.pth"),
        ("/a/..%252F..%252Fname.pth", "name.pth"),
        ("/a/%25252e%25252e%25252fname.pth", "name.pth"),
        ("/a/..\\..\\name.pth", "name.pth"),
        ("/a/..%5C..%255Cname.pth", "name.pth"),
        ("C:\\models\\name.PTH", "name.PTH"),
        ("x" * 196 + ".pth", "x" * 196 + ".pth"),
    ],
)
def test_names_from_outside_become_plain_ones(tmp_path: Path, text: str, name: str) -> None:
    assert plain_name(text, (".pth",)) == name
    assert file_in(tmp_path, text, (".pth",)) == tmp_path / name


@pytest.mark.parametrize("encode", [lambda text: text, quote, lambda text: quote(quote(text))])
@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "names no file"),
        (".", "names no file"),
        ("/a/..", "names no file"),
        ("/a/ .. ", "names no file"),
        ("/a/b.pth/", "names no file"),
        ("..\\", "names no file"),
        (".pth", "begins with a dot"),
        ("/a/.bashrc.pth", "begins with a dot"),
        ("a\0.pth", "cannot be printed"),
        ("a\nb.pth", "cannot be printed"),
        ("a\x1b[2Jb.pth", "cannot be printed"),
        ("a\x9bb.pth", "cannot be printed"),
        ("a\u202eb.pth", "cannot be printed"),
        ("x" * 197 + ".pth", "too long"),
        ("é" * 100 + ".pth", "too long"),
        ("/a/b.sh", "does not end in .pth or .pt$"),
        ("/a/b.pth.sh", "does not end in"),
        ("/a/pth", "does not end in"),
    ],
)
def test_names_from_outside_that_are_refused(tmp_path: Path, text: str, problem: str, encode) -> None:
    problem = problem.removesuffix("$") + (r"\)" if problem.endswith("$") else "")
    for function in (plain_name, lambda *arguments: file_in(tmp_path, *arguments)):
        with pytest.raises(UserError, match=f"cannot be the name of a file .*{problem}"):
            function(encode(text), (".pth", ".pt"))


def test_json_is_valid_whatever_it_holds(tmp_path: Path) -> None:
    name = b"\xff\x1b\n".decode(errors="surrogateescape")
    write_json(tmp_path / "a.json", {"x": [1.5, float("nan"), (float("inf"), None, True)], "name": name})

    def no_json(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "a.json").read_bytes().decode("ascii")
    assert json.loads(text, parse_constant=no_json) == {"x": [1.5, None, [None, None, True]], "name": name}


def test_names_too_long_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert is_file(tmp_path / "a") and not is_file(tmp_path) and not is_file(tmp_path / ("x" * 5000))


def test_endless_decoding_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="too long"):
        plain_name("%25" * 1_000_000 + "2F.pth")
    with pytest.raises(UserError, match="too long"):
        plain_name("%" + "25" * 1_000_000 + "2F.pth")
