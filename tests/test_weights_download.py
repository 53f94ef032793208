"""Downloads from servers that mean harm: nothing is written but whole checkpoints, and those into the cache alone."""

import os
from pathlib import Path

import pytest
import torch
from file_server import Server, serving

import spark_me
from spark_me.weights.download import local_file

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
    assert written(home) == ["cache/hub/checkpoints/name.pth"]


@pytest.mark.parametrize("name", ["", "a/", "a/..%2F", "a/%2e%2e", "a/.pth", "a/b%2F.x.pth", "a/b%00.pth", "a/b.sh"])
def test_names_that_are_none_are_not_even_asked_for(server: Server, home: Path, content: bytes, name: str) -> None:
    server.files[name] = content
    with pytest.raises(spark_me.UserError, match="cannot be the name of a file"):
        local_file(server.url(name))
    assert server.requests == 0 and written(home) == []
