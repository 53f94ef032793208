"""Webdataset shards: what is found in them, and what cannot be read."""

import sys
from pathlib import Path

import braceexpand
import pytest
from tar_shards import png, write_shard, write_shards

from spark_me.config.data import DataConfig
from spark_me.data.files import find_files, fingerprint
from spark_me.data.sampler import Share
from spark_me.data.shards import Shards, TarImages, count_names
from spark_me.data.streams import ShardSampler
from spark_me.errors import UserError


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    return write_shards(tmp_path)


def shards_of(pattern: str) -> Shards:
    shards = find_files(DataConfig(kind="webdataset", root=pattern)).train
    assert isinstance(shards, Shards)
    return shards


def test_local_shards_are_counted_and_pipes_say_their_number(pattern: str) -> None:
    assert len(shards_of(pattern)) == 24
    piped = find_files(DataConfig(kind="webdataset", root=f"pipe:cat {pattern}", samples=24)).train
    assert isinstance(piped, Shards)
    assert [image.content for image in piped] == [image.content for image in shards_of(pattern)]
    assert fingerprint(piped) != fingerprint(shards_of(pattern))


def test_members_that_are_no_image_and_the_key_of_the_image(tmp_path: Path) -> None:
    members = {"a.txt": b"x", "b.png": png(1), "b.mask.png": png(2), "c.png": png(3)}
    write_shard(tmp_path / "a.tar", members)
    data = DataConfig(kind="webdataset", root=str(tmp_path / "a.tar"))
    assert [Path(image.name).name for image in find_files(data).train] == ["b.png", "c.png"]
    assert len(find_files(data).train) == len(TarImages([str(tmp_path / "a.tar")])) == 2
    data.image_key = "mask.png"
    assert [image.content for image in find_files(data).train] == [png(2)]
    data.image_key = "jpg"
    with pytest.raises(UserError, match="no images in these shards: check data.image_key=jpg"):
        find_files(data)


def test_held_out_shards_are_read_at_any_place(pattern: str) -> None:
    files = find_files(DataConfig(kind="webdataset", root=pattern, val_root=pattern.replace("{00..03}", "{01..02}")))
    assert len(files.held_out) == 13
    for place in (12, 0, 7):
        assert files.held_out[place].content == png(5 + place)
        assert Path(str(files.held_out[place])).name == f"{5 + place:03}.png"


def test_missing_and_damaged_shards(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*04.tar \(1 of 5 shards are missing\)"):
        find_files(DataConfig(kind="webdataset", root=pattern.replace("03}", "04}")))
    second = tmp_path / "01.tar"
    second.write_bytes(second.read_bytes()[:6000])
    with pytest.raises(UserError, match="cannot be read beyond its first . images"):
        list(ShardSampler(Shards(shards_of_any(pattern), 24), Share(4, 6, seed=0), repeats=1, buffer=1))
    second.write_bytes(b"no tar")
    with pytest.raises(UserError, match="01.tar: is no whole, uncompressed tar archive"):
        find_files(DataConfig(kind="webdataset", root=pattern))


def shards_of_any(pattern: str) -> list[str]:
    return [pattern.replace("{00..03}", f"{number:02}") for number in range(4)]


@pytest.mark.parametrize("command", ["false", "cat /nowhere/a.tar", "echo no tar"])
def test_command_that_fails(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as caught:
        list(Shards([f"pipe:{command}"], 5))
    message = str(caught.value)
    assert message.startswith(f"pipe:{command}: cannot be read beyond its first 0 images")
    assert "\n" not in message and " at 0x" not in message


def test_missing_package_names_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(UserError, match=r"pip install -e \"\.\[webdataset\]\"`"):
        find_files(DataConfig(kind="webdataset", root="a.tar"))


@pytest.mark.parametrize(
    "pattern",
    ["a.tar", "{000..127}.tar", "{a,b}{1..3}", "{2.{5..7},3.{2,3}}", "{10..1..3}", "x{y}z", r"\{a,b\}", "{,a}", "a,b"],
)
def test_names_are_counted_as_they_are_expanded(pattern: str) -> None:
    assert count_names(pattern) == len(list(braceexpand.braceexpand(pattern)))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("{0..99}{0..99}{0..99}{0..99}.tar", "stands for more than 1,000,000 shards"),
        ("{0..999999999999}.tar", "stands for more than 1,000,000 shards"),
        ("{0.." + "9" * 5000 + "}.tar", "stands for more than 1,000,000 shards"),
        ("{" + "a," * 2_000_000 + "}.tar", "stands for more than 1,000,000 shards"),
        ("{{0..9999},{0..9999}}{0..999}::b.tar", "stands for more than 1,000,000 shards"),
        ("{" * 100 + "}" * 100, "nested more than 20 deep"),
        ("{00..03.tar", "braces are not balanced"),
        ("{00..03}}.tar", "braces are not balanced"),
    ],
)
@pytest.mark.parametrize("key", ["root", "val_root"])
def test_patterns_that_are_none_are_refused_before_they_are_expanded(pattern: str, reason: str, key: str) -> None:
    places = {"root": __file__, key: pattern}
    with pytest.raises(UserError) as caught:
        find_files(DataConfig(kind="webdataset", samples=1, **places))
    assert str(caught.value).startswith(f"data.{key}={pattern[:9]}") and reason in str(caught.value)
    assert "\n" not in str(caught.value)
