"""The per-user cache: its place, whole wheels only, one builder at a time."""

import os
import threading
import zipfile
from pathlib import Path

import pytest

from spark_me.engine import source
from spark_me.errors import EngineError


def test_a_cut_wheel_is_not_taken_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path))
    wheel = tmp_path / "engine.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("module.py", "x" * 1000)
    stored = source.store_wheel(wheel, "key")
    assert not wheel.exists()
    assert source.cached_wheel("key") == stored
    assert source.cached_wheel("other") is None
    stored.write_bytes(stored.read_bytes()[:-40])
    assert source.cached_wheel("key") is None


def stored_wheel(folder):
    wheel = folder / "engine.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("module.py", "x" * 1000)
    return source.store_wheel(wheel, "key")


def test_a_wheel_that_was_put_there_is_not_taken(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path))
    stored = stored_wheel(tmp_path)
    other = stored.read_bytes().replace(b"x" * 1000, b"y" * 1000)
    digest = stored.with_name(stored.name + ".sha256")
    text = digest.read_text()
    for wheel, written in ((other, text), (stored.read_bytes(), None), (stored.read_bytes(), "0" * 64)):
        stored.write_bytes(wheel)
        digest.unlink(missing_ok=True)
        if written is not None:
            digest.write_text(written)
        assert source.cached_wheel("key") is None
        assert "it is built again" in capsys.readouterr().out
    assert source.cached_wheel("key") is None
    assert stored_wheel(tmp_path) == source.cached_wheel("key") == stored


@pytest.mark.parametrize("part", [".", "wheels", "wheels/key"])
@pytest.mark.parametrize("change", [lambda path: path.chmod(0o777), lambda path: os.chown(path, 12345, 0)])
def test_a_cache_that_others_may_write_to_is_refused(monkeypatch, tmp_path, part, change):
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path / "cache"))
    stored_wheel(tmp_path)
    try:
        change(tmp_path / "cache" / part)
    except PermissionError:
        pytest.skip("only root gives files away")
    for act in (lambda: source.cached_wheel("key"), lambda: stored_wheel(tmp_path)):
        with pytest.raises(EngineError, match="others may write to it"):
            act()


def test_a_second_build_of_one_key_waits_for_the_first(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path))
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
