"""The source archive, from an index or a file and none but the pinned one; and the per-user cache of whole wheels."""

import contextlib
import hashlib
import io
import os
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from spark_me.engine import source
from spark_me.errors import EngineError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_archive(name, text=b"", link=None):
    """An archive of one file, or of a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        if link:
            member.type, member.linkname = tarfile.SYMTYPE, link
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    return buffer.getvalue()


GENUINE = make_archive("MinkowskiEngine-0.5.4/setup.py", b"raise SystemExit('upstream setup.py ran')")


@pytest.fixture
def index(monkeypatch):
    """A package index on this machine; `served` is what it hands out as the archive, `requests` what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            if self.path.endswith(".tar.gz"):
                self.answer("application/gzip", server.served)
            else:
                self.answer("text/html", f'<a href="/files/{server.filename}">{server.filename}</a>'.encode())

        def answer(self, kind, body):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # who asks may have read enough
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.served, server.filename = [], GENUINE, source.ARCHIVE_NAME
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(source, "ARCHIVE_SHA256", hashlib.sha256(GENUINE).hexdigest())
    yield server
    server.shutdown()
    server.server_close()


def test_downloads_once_from_the_index_that_pip_uses(index):
    archive = source.get_archive()
    assert archive.read_bytes() == GENUINE
    asked = len(index.requests)
    assert asked > 0
    assert source.get_archive() == archive
    assert len(index.requests) == asked


def test_a_tampered_download_is_refused_and_leaves_nothing(index, cache):
    index.served = GENUINE + b"more"
    with pytest.raises(EngineError, match="sha256"):
        source.get_archive()
    assert list((cache / "source").iterdir()) == []


def test_a_download_of_another_size_ends_there(index, cache, monkeypatch):
    read = []

    def counted(*args, blocks=requests.Response.iter_content):
        for block in blocks(*args):
            read.append(len(block))
            yield block

    monkeypatch.setattr(requests.Response, "iter_content", counted)
    monkeypatch.setattr(source, "ARCHIVE_BYTES", len(GENUINE))
    index.served = GENUINE + b"x" * 30_000_000
    with pytest.raises(
        EngineError, match="larger than the MinkowskiEngine 0.5.4 that spark_me builds; nothing was kept"
    ):
        source.get_archive()
    assert 0 < sum(read) < 1_000_000
    assert list((cache / "source").iterdir()) == []


def test_a_damaged_cached_archive_is_fetched_again(index):
    archive = source.get_archive()
    archive.write_bytes(GENUINE[:100])
    assert source.get_archive().read_bytes() == GENUINE


def test_an_index_without_the_archive_says_so(index):
    index.filename = "MinkowskiEngine-0.4.3.tar.gz"
    with pytest.raises(EngineError, match="--source FILE"):
        source.get_archive()


def test_no_network_is_one_line(index, cache):
    index.shutdown()
    index.server_close()
    with pytest.raises(EngineError, match="cannot be downloaded.*--source FILE") as caught:
        source.get_archive()
    assert "\n" not in str(caught.value)
    assert list((cache / "source").iterdir()) == []


def test_a_given_file_must_exist_and_be_the_pinned_archive(index, tmp_path):
    with pytest.raises(EngineError, match="no such file"):
        source.get_archive(tmp_path / "missing.tar.gz")
    given = tmp_path / "given.tar.gz"
    given.write_bytes(GENUINE)
    assert source.get_archive(given) == given
    given.write_bytes(GENUINE[:-1])
    with pytest.raises(EngineError, match=r"given\.tar\.gz.*sha256"):
        source.get_archive(given)
    assert index.requests == []


def test_unpack_returns_the_tree(tmp_path):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(GENUINE)
    tree = source.unpack(archive, tmp_path / "out")
    assert [path.name for path in tree.iterdir()] == ["setup.py"]


BAD = {
    "parent": make_archive("../escaped", b"x"),
    "absolute": make_archive("/escaped", b"x"),
    "link": make_archive("MinkowskiEngine-0.5.4/src", link="/etc"),
    "cut": GENUINE[:60],
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_unpack_refuses_bad_archives(tmp_path, content):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(content)
    with pytest.raises(EngineError, match="cannot be unpacked"):
        source.unpack(archive, tmp_path / "out")
    assert not any(path.is_file() or path.is_symlink() for path in tmp_path.rglob("*") if path != archive)
    assert not Path("/escaped").exists()


def store_wheel(folder):
    wheel = folder / "engine.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("module.py", "x" * 1000)
    stored = source.store_wheel(wheel, "key")
    assert not wheel.exists()
    return stored


def test_a_wheel_that_is_damaged_or_was_put_there_is_not_taken(tmp_path, capsys):
    stored = store_wheel(tmp_path)
    assert source.cached_wheel("key") == stored
    assert source.cached_wheel("other") is None
    whole, digest = stored.read_bytes(), stored.with_name(stored.name + ".sha256")
    text, other = digest.read_text(), whole.replace(b"x" * 1000, b"y" * 1000)
    for wheel, written in ((whole[:-40], text), (other, text), (whole, None), (whole, "0" * 64)):
        stored.write_bytes(wheel)
        digest.unlink(missing_ok=True)
        if written is not None:
            digest.write_text(written)
        assert source.cached_wheel("key") is None
        assert "it is built again" in capsys.readouterr().out
    assert store_wheel(tmp_path) == source.cached_wheel("key") == stored


@pytest.mark.parametrize("part", [".", "wheels", "wheels/key"])
@pytest.mark.parametrize("change", [lambda path: path.chmod(0o777), lambda path: os.chown(path, 12345, 0)])
def test_a_cache_that_others_may_write_to_is_refused(cache, tmp_path, part, change):
    store_wheel(tmp_path)
    try:
        change(cache / part)
    except PermissionError:
        pytest.skip("only root gives files away")
    for act in (lambda: source.cached_wheel("key"), lambda: store_wheel(tmp_path)):
        with pytest.raises(EngineError, match="others may write to it"):
            act()


def test_a_second_build_of_one_key_waits_for_the_first(monkeypatch):
    waiting, order = threading.Event(), []
    monkeypatch.setattr(source, "print", lambda *args, **kwargs: waiting.set(), raising=False)

    def second():
        with source.locked("key"):
            order.append("second")

    thread = threading.Thread(target=second)
    with source.locked("key"):
        thread.start()
        assert waiting.wait(timeout=30)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [("/a", "/b", "/a"), (None, "/b", "/b/spark_me"), (None, None, "/home/me/.cache/spark_me")],
)
def test_the_cache_is_per_user_and_can_be_moved(monkeypatch, own, xdg, expected):
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("SPARK_ME_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert source.cache_dir() == Path(expected)
