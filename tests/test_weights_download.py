"""Downloads from servers that mean harm: nothing is written but whole checkpoints, and those into the cache alone."""

import hashlib
import io
import os
import re
import sys
import urllib.request
from email.message import Message
from pathlib import Path

import pytest
import torch
from file_server import Server, serving
from terminal import record

import spark_me
from spark_me.cli import main
from spark_me.weights import download
from spark_me.weights.download import local_file
from spark_me.weights.files import read_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that a test may write to, with files that are to stay as they are."""
    home = tmp_path / "home"
    site = home / ".local" / "lib" / "site-packages"
    site.mkdir(parents=True)
    (site / "kept.pth").write_text("kept")
    monkeypatch.setenv("TORCH_HOME", str(home / "cache"))
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    torch.save({"weight": torch.arange(10_000.0)}, tmp_path / "some.pth")
    return (tmp_path / "some.pth").read_bytes()


def written(home: Path) -> list[str]:
    """What lies there that was not there before."""
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(home.parent) for name in names)
    found = [os.path.relpath(path, home) for path in paths]
    return sorted(set(found) - {"../some.pth", ".local/lib/site-packages/kept.pth"})


def cached(url: str, name: str) -> str:
    """Where the copy of a URL belongs that has no digest in its name."""
    return f"cache/hub/checkpoints/{hashlib.sha256(url.encode()).hexdigest()[:16]}/{name}"


ESCAPES = [
    "a/b/..%2F..%2F..%2F..%2F.local%2Flib%2Fsite-packages%2Fname.pth",
    "a/..%252F..%252F..%252F.local%252Flib%252Fsite-packages%252Fname.pth",
    "a/%2Fproc%2Fname.pth",
    "a/..%5C..%5Cname.pth",
    "a/..%255C..\\name.pth",
    "%2e%2e/%2e%2e%2f%252e%252e%252fname.pth",
    "a/b/..%2F..%2F..%2F..%2F.local%2Flib%2Fsite-packages%2Fname.pth?name=../../x.pth#../y.pth",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_encoded_slashes_lead_nowhere(server: Server, home: Path, content: bytes, name: str) -> None:
    server.files[name.partition("#")[0]] = content
    path = local_file(server.url(name))
    assert path.read_bytes() == content
    assert written(home) == [cached(server.url(name), "name.pth")]


@pytest.mark.parametrize("name", ["", "a/", "a/..%2F", "a/%2e%2e", "a/.pth", "a/b%2F.x.pth", "a/b%00.pth", "a/b.sh"])
def test_names_that_are_none_are_not_even_asked_for(server: Server, home: Path, content: bytes, name: str) -> None:
    server.files[name] = content
    with pytest.raises(spark_me.UserError, match="cannot be the name of a file"):
        local_file(server.url(name))
    assert server.requests == 0 and written(home) == []


def refused(server: Server, answer: object, name: str = "some.pth") -> str:
    """The one line in which a download ends."""
    server.files[name] = answer  # type: ignore[assignment]
    with pytest.raises(spark_me.UserError) as caught:
        local_file(server.url(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("announced", [True, False])
def test_whole_files_are_kept_whatever_is_announced(server: Server, home: Path, content: bytes, announced: bool):
    def answer(handler):
        handler.begin(200, *([("Content-Length", str(len(content)))] if announced else []))
        handler.wfile.write(content)

    server.files["some.pth"] = answer
    assert local_file(server.url("some.pth")).read_bytes() == content
    assert written(home) == [cached(server.url("some.pth"), "some.pth")]


def test_chunked_answers_are_put_together(server: Server, home: Path, content: bytes):
    server.files["some.pth"] = in_chunks(content)
    assert local_file(server.url("some.pth")).read_bytes() == content


def in_chunks(content: bytes, *headers: tuple[str, str]):
    def answer(handler):
        handler.begin(200, ("Transfer-Encoding", "chunked"), *headers)
        for start in range(0, len(content), 1000):
            piece = content[start : start + 1000]
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    return answer


def test_urls_of_one_file_name_are_several_files(server: Server, home: Path, tmp_path: Path):
    names = ["1/some.pth", "2/some.pth", "some.pth?version=3"]
    for number, name in enumerate(names):
        torch.save({"weight": torch.full((3,), float(number))}, tmp_path / "some.pth")
        server.files[name] = (tmp_path / "some.pth").read_bytes()
    for _ in range(2):
        assert [read_state(local_file(server.url(name)))["weight"][0].item() for name in names] == [0, 1, 2]
    assert server.requests == 3, "each is fetched once"


def test_file_with_its_digest_is_shared_with_torch_hub(server: Server, home: Path, content: bytes):
    name = f"some-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[f"a/{name}"] = server.files[f"b/{name}"] = content
    assert local_file(server.url(f"a/{name}")) == local_file(server.url(f"b/{name}"))
    assert server.requests == 1 and written(home) == [f"cache/hub/checkpoints/{name}"]


def test_what_killed_downloads_leave_is_cleared(server: Server, home: Path, content: bytes):
    place = home / cached(server.url("some.pth"), "some.pth")
    place.parent.mkdir(parents=True)
    (place.parent / f".{'0' * 16}.tmp.some.pth").write_bytes(content[:1000])
    server.files["some.pth"] = content
    assert local_file(server.url("some.pth")) == place and os.listdir(place.parent) == ["some.pth"]


@pytest.mark.parametrize("when", ["before its head", "in its head", "after its head", "in its content"])
def test_servers_that_stop_sending(server: Server, home: Path, content: bytes, when: str, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)

    def answer(handler):
        if when == "in its head":
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-")
        elif when != "before its head":
            handler.begin(200, ("Content-Length", str(len(content))))
            handler.wfile.write(content[: 5000 if when == "in its content" else 0])
        handler.server.closing.wait(20)

    assert "cannot be downloaded" in (text := refused(server, answer)) and "timed out" in text
    assert written(home) == []


HEAD = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
    "in the head": (HEAD + b"X: ", b"x"),
    "in the head's lines": (HEAD, b"X: x\r\n"),
    "before the head": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "in the content": (HEAD + b"Content-Length: 20000000\r\n\r\n", b"x"),
    "in a chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n", b"x"),
    "in a chunk's size": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "behind the last chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"x: x\r\n"),
}


@pytest.mark.parametrize("where", ENDLESS)
def test_servers_that_never_end_anywhere(server: Server, home: Path, where: str, monkeypatch):
    begin, more = ENDLESS[where]
    monkeypatch.setattr(download, "LARGEST_FILE", 1_000_000)

    def answer(handler):
        handler.wfile.write(begin)
        for _ in range(2000):
            handler.wfile.write(more * 10_000)

    assert re.search("cannot be downloaded|more is sent|was not kept", refused(server, answer))
    assert written(home) == []


@pytest.mark.parametrize("where", ENDLESS)
def test_servers_that_send_a_byte_at_a_time(server: Server, home: Path, where: str, monkeypatch):
    begin, more = ENDLESS[where]
    monkeypatch.setattr(download, "SPAN", 0.3)

    def answer(handler):
        handler.wfile.write(begin)
        while not handler.server.closing.wait(0.06):
            handler.wfile.write(more[:1] if len(more) < 5 else more)

    # Where lines are read, of which there are only so many, these may be over before.
    expected = "less than 1000 bytes a second come" + ("|headers" if "lines" in where else "")
    assert re.search(expected, refused(server, answer))
    assert written(home) == []


def endless(*headers: tuple[str, str], code: int = 200):
    def answer(handler):
        handler.begin(code, *headers)
        for _ in range(20_000):
            handler.wfile.write(b"x" * 10_000)

    return answer


def test_servers_that_never_end(server: Server, home: Path, content: bytes, monkeypatch):
    monkeypatch.setattr(download, "LARGEST_FILE", 1_000_000)
    assert "more is sent than the 1000000 bytes that a file of no announced length" in refused(server, endless())
    assert "more is sent than announced" in refused(server, in_chunks(content, ("Content-Length", "30000")))
    # What follows the announced length is not read, so a whole checkpoint before it would be kept; here there is none.
    assert "the download was not kept" in refused(server, endless(("Content-Length", "30000")))
    # An error's page and a redirect's are not read at all.
    assert "HTTP 404" in refused(server, endless(code=404))
    assert "HTTP 404" in refused(server, endless(("Location", server.url("nothing.pth")), code=302))
    assert written(home) == []


def test_files_that_are_too_short(server: Server, home: Path, content: bytes):
    server.promised = len(content) + 1
    assert f"is cut off ({len(content)} of {len(content) + 1} bytes); nothing was kept" in refused(server, content)
    server.promised = None
    assert "damaged" in refused(server, content[:-500])

    def cut(handler):
        handler.begin(200, ("Transfer-Encoding", "chunked"))
        handler.wfile.write(b"ffff\r\n" + content[:1000])

    assert "cannot be downloaded" in refused(server, cut)
    assert written(home) == []


def test_files_larger_than_the_disk(server: Server, home: Path, content: bytes):
    for length, problem in (("9" * 17, "free space, or set TORCH_HOME"), ("9" * 5000, "cut off|damaged"), ("-1", "")):
        assert re.search(problem, refused(server, endless(("Content-Length", length)) if problem else b"short"))
    assert written(home) == []


@pytest.mark.parametrize(
    "target, problem",
    [
        ("file:///etc/passwd", "cannot be downloaded .*file:///etc/passwd"),
        ("file:/etc/passwd", "cannot be downloaded .*file:/etc/passwd"),
        ("ftp://127.0.0.1:1/x.pth", "ftp: is not downloaded from"),
        ("data:text/plain,x", "cannot be downloaded .*data:"),
        ("//[::1/x.pth", "cannot be downloaded .*Invalid IPv6 URL"),
        ("http://", "cannot be downloaded|names no host"),
        ("/again.pth", "cannot be downloaded"),
    ],
)
def test_redirects_elsewhere_are_refused(server: Server, home: Path, target: str, problem: str):
    answer = server.files["again.pth"] = lambda handler: handler.begin(302, ("Location", target))
    assert re.search(problem, refused(server, answer))
    assert written(home) == []


def test_redirects_from_https_to_http_are_refused():
    def ask(source: str, target: str):
        request = urllib.request.Request(source)
        return download._Redirects().redirect_request(request, io.BytesIO(), 302, "Found", Message(), target)

    for source, target in (("https", "https"), ("http", "https"), ("http", "http")):
        assert ask(f"{source}://a/x.pth", f"{target}://b/y").full_url == f"{target}://b/y"
    with pytest.raises(spark_me.UserError, match="https://a/x.pth: leads to http://b/y, which is not encrypted"):
        ask("https://a/x.pth", "http://b/y")


def test_files_keep_the_name_that_was_asked_for(server: Server, home: Path, content: bytes):
    """Whatever the server calls it."""
    server.files["stored/..%2F..%2Fother.pth"] = lambda handler: (
        handler.begin(200, ("Content-Disposition", 'attachment; filename="../../third.pth"')),
        handler.wfile.write(content),
    )
    url = server.url("stored/..%2F..%2Fother.pth")
    server.files["some.pth"] = lambda handler: handler.begin(302, ("Location", url))
    assert local_file(server.url("some.pth")).read_bytes() == content
    assert written(home) == [cached(server.url("some.pth"), "some.pth")]


@pytest.mark.parametrize(
    "url, problem",
    [
        ("http://[::1/x.pth", "is no URL .*Invalid IPv6 URL"),
        ("http://127.0.0.1:port/x.pth", "is no URL"),
        ("http://127.0.0.1:99999/x.pth", "is no URL"),
        ("http://me:secret@127.0.0.1:1/x.pth", "cannot be downloaded"),
        ("http:///x.pth", "is no URL .it names no host"),
        ("http:x.pth", "is no URL .it names no host"),
        ("https:/127.0.0.1/x.pth", "is no URL .it names no host"),
        ("http://" + "a" * 70 + ".invalid/x.pth", "cannot be downloaded"),
        ("file:///etc/x.pth", "file: is not downloaded from"),
        ("FILE:/etc/x.pth", "file: is not downloaded from"),
        ("ftp://127.0.0.1/x.pth", "ftp: is not downloaded from"),
        ("data:,x.pth", "data: is not downloaded from"),
        ("s3://bucket/x.pth", "s3: is not downloaded from"),
        ("http://127.0.0.1:1/x.pth\nHost: other", "cannot be the name of a file"),
        ("http://127.0.0.1:1/a b\r\nHost: other/é.pth", "cannot be downloaded"),
    ],
)
def test_urls_that_are_none_are_one_line(home: Path, url: str, problem: str, capsys):
    assert main(["convert", url, str(home / "out.pth"), "--to", "timm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(problem, line)
    assert written(home) == []


def test_letters_beyond_ascii_and_capitals_are_fine(server: Server, home: Path, content: bytes):
    server.files["%C3%A9%20t%C3%A9.pth"] = content
    assert local_file(server.url("é té.pth").replace("http", "HTTP")).name == "é té.pth"


def test_full_disks_are_told_from_networks(server: Server, home: Path, content: bytes, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert "cannot be written (No space left on device)" in refused(server, content)
    assert written(home) == []
    monkeypatch.setenv("TORCH_HOME", str(home / ".local" / "lib" / "site-packages" / "kept.pth"))
    assert "cannot be written (Not a directory)" in refused(server, content)


def test_terminals_get_a_bar(server: Server, home: Path, content: bytes, capsys, monkeypatch):
    server.files["some.pth"] = server.files["other.pth"] = server.files["third.pth"] = content
    recording = record(lambda: len(local_file(server.url("some.pth")).name), 80)
    recording.assert_tidy(80)
    assert any(line.startswith("some.pth: 100%|") for line in recording.screen)
    local_file(server.url("other.pth"))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert record(lambda: len(local_file(server.url("third.pth")).name), 80).raw == ""
