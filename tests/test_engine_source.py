"""Getting MinkowskiEngine's source: from an index, from a file, refused when it is not the pinned archive."""

import contextlib
import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spark_me.engine import source
from spark_me.errors import EngineError


def make_archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


GENUINE = make_archive({"MinkowskiEngine-0.5.4/setup.py": b"raise SystemExit('upstream setup.py ran')"})


@pytest.fixture
def index(monkeypatch, tmp_path):
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
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path / "cache"))
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


def test_a_tampered_download_is_refused_and_leaves_nothing(index, tmp_path):
    index.served = GENUINE + b"more"
    with pytest.raises(EngineError, match="sha256"):
        source.get_archive()
    assert list((tmp_path / "cache" / "source").iterdir()) == []


def test_a_download_of_another_size_ends_there(index, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(source, "ARCHIVE_BYTES", len(GENUINE))
    monkeypatch.setattr(
        source._AtMost, "update", lambda self, n, update=source._AtMost.update: read.append(n) or update(self, n)
    )
    index.served = GENUINE + b"x" * 30_000_000
    with pytest.raises(
        EngineError, match="larger than the MinkowskiEngine 0.5.4 that spark_me builds; nothing was kept"
    ):
        source.get_archive()
    assert sum(read) < 1_000_000
    assert list((tmp_path / "cache" / "source").iterdir()) == []


def test_a_damaged_cached_archive_is_fetched_again(index):
    archive = source.get_archive()
    archive.write_bytes(GENUINE[:100])
    assert source.get_archive().read_bytes() == GENUINE


def test_an_index_without_the_archive_says_so(index):
    index.filename = "MinkowskiEngine-0.4.3.tar.gz"
    with pytest.raises(EngineError, match="--source FILE"):
        source.get_archive()


def test_no_network_is_one_line(index, tmp_path):
    index.shutdown()
    index.server_close()
    with pytest.raises(EngineError, match="cannot be downloaded.*--source FILE") as caught:
        source.get_archive()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "source").iterdir()) == []


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


def make_link(name, target):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.SYMTYPE, target
        tar.addfile(link)
    return buffer.getvalue()


BAD = {
    "parent": make_archive({"../escaped": b"x"}),
    "absolute": make_archive({"/escaped": b"x"}),
    "link": make_link("MinkowskiEngine-0.5.4/src", "/etc"),
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
