"""Writing: whole or not at all."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from spark_me.errors import UserError
from spark_me.files import (
    atomic_write,
    check_output,
    check_output_folder,
    clear_leftovers,
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


def test_planted_names_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that was guessed: whatever lies there stays, and another name is taken."""
    kept = tmp_path / "kept"
    kept.write_text("kept")
    guesses = iter(["0" * 16, "1" * 16, "2" * 16])
    monkeypatch.setattr("secrets.token_hex", lambda size: next(guesses))
    (tmp_path / f".{'0' * 16}.tmp.a.txt").symlink_to(kept)
    with pytest.raises(UserError, match="cannot be written .File exists"):
        write_text(tmp_path / "a.txt", "new")
    assert kept.read_text() == "kept" and not (tmp_path / "a.txt").exists()
    os.mkfifo(tmp_path / f".{'1' * 16}.tmp.a.txt")
    with pytest.raises(UserError, match="cannot be written .File exists"):
        write_text(tmp_path / "a.txt", "new")
    write_text(tmp_path / "a.txt", "new")


def test_files_of_the_user_beside_it_stay(tmp_path: Path) -> None:
    names = (".a.txt.tmp", "a.txt.tmp", ".tmp.a.txt", f".{'0' * 15}.tmp.a.txt", f".{'0' * 16}.tmp.")
    for name in names:
        (tmp_path / name).write_text("kept")
    write_text(tmp_path / "a.txt", "new")
    assert clear_leftovers(tmp_path) == []
    assert [(tmp_path / name).read_text() for name in names] == ["kept"] * 5


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o444])
def test_mode_is_kept(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    path.chmod(mode)
    with atomic_write(path):
        (temporary,) = (other for other in tmp_path.iterdir() if other != path)
        assert stat.S_IMODE(temporary.stat().st_mode) == mode, "also while it is written"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_new_file_has_the_mode_that_the_user_wants(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to("there/a.txt")
    for text in ("new", "newer"):
        check_output(link)
        write_text(link, text)
        assert link.is_symlink() and (tmp_path / "there" / "a.txt").read_text() == text
    assert os.listdir(tmp_path / "there") == ["a.txt"]


def test_devices_and_pipes_are_written_into(tmp_path: Path) -> None:
    """Also by root, who may replace a device by a file."""
    for device in ("/dev/null", "/dev/full", "/dev/stdout", "/dev/fd/1"):
        was = os.lstat(device)
        check_output(Path(device))
        try:
            write_text(Path(device), "")
        finally:
            assert (os.lstat(device).st_ino, os.lstat(device).st_mode) == (was.st_ino, was.st_mode)
    with pytest.raises(UserError, match="/dev/full: cannot be written .No space left"):
        write_text(Path("/dev/full"), "new")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    write_json(fifo, {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize("to", ["file", "pipe"])
def test_standard_output_by_its_name(tmp_path: Path, to: str) -> None:
    code = "from pathlib import Path; from spark_me.files import write_text; write_text(Path('/dev/stdout'), 'new')"
    with (tmp_path / "out").open("wb") as file:
        output = subprocess.PIPE if to == "pipe" else file
        done = subprocess.run([sys.executable, "-c", code], stdout=output, check=True)
        inode = os.fstat(file.fileno()).st_ino
    assert (tmp_path / "out").stat().st_ino == inode and os.listdir(tmp_path) == ["out"]
    assert (done.stdout if to == "pipe" else (tmp_path / "out").read_bytes()) == b"new"


WRITE = """
import sys
from pathlib import Path
from spark_me.files import atomic_write
with atomic_write(Path(sys.argv[1]), alone=False) as file:
    file.write(b"others")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_one_writer_at_a_time(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with subprocess.Popen(
        [sys.executable, "-c", WRITE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(UserError, match="a.txt: another process is writing it now: wait for its end, or name"):
            write_text(path, "new")
        assert path.read_text() == "old" and len(clear_leftovers(tmp_path)) == 1
        write_text(tmp_path / "b.txt", "new")  # another file is another matter
        with atomic_write(path, alone=False) as file:
            file.write(b"together")
        assert path.read_text() == "together"
        if end == "killed":
            other.send_signal(signal.SIGKILL)
        else:
            other.stdin.close()
        other.wait()
    assert path.read_text() == ("together" if end == "killed" else "others")
    assert len(os.listdir(tmp_path)) == (3 if end == "killed" else 2)
    write_text(path, "new")  # which clears what the killed one left
    assert path.read_text() == "new" and sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]


def test_what_kills_left_of_all_files_is_cleared(tmp_path: Path) -> None:
    for name in ("a.txt", "step_00000001.pt", "two words\n"):
        (tmp_path / f".{os.urandom(8).hex()}.tmp.{name}").write_text("half")
    (tmp_path / f".{'0' * 16}.tmp.link").symlink_to(tmp_path)
    with atomic_write(tmp_path / "b.txt") as file:
        assert clear_leftovers(tmp_path) == [], "what this process writes is no leftover"
        file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == [f".{'0' * 16}.tmp.link", "b.txt"]


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
