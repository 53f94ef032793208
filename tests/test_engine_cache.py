"""The per-user cache: its place, whole wheels only, one builder at a time."""

import threading
import zipfile
from pathlib import Path

import pytest

from spark_me.engine import cache


def test_a_cut_wheel_is_not_taken_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path))
    wheel = tmp_path / "engine.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("module.py", "x" * 1000)
    stored = cache.store_wheel(wheel, "key")
    assert not wheel.exists()
    assert cache.cached_wheel("key") == stored
    assert cache.cached_wheel("other") is None
    stored.write_bytes(stored.read_bytes()[:-40])
    assert cache.cached_wheel("key") is None


def test_a_second_build_of_one_key_waits_for_the_first(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path))
    waiting, order = threading.Event(), []
    monkeypatch.setattr(cache, "print", lambda *args, **kwargs: waiting.set(), raising=False)

    def second():
        with cache.locked("key"):
            order.append("second")

    thread = threading.Thread(target=second)
    with cache.locked("key"):
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
    assert cache.cache_dir() == Path(expected)
