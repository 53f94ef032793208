"""Damaged tar archives: either all images come, or one line says that not all did."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from child import MIB, run_limited
from mutations import mutate
from tar_shards import png, write_shard

from spark_me.data.shards import Shards, TarImages
from spark_me.errors import UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "long/" * 30 + "ü"
PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def archive(kind: str = "ustar", images: int = 4) -> bytes:
    """Images with labels beside them; the names of the last are too long for a header where the format allows that."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as tar:
        for number in range(images):
            folder = f"{LONG}/" if number == images - 1 and kind != "ustar" else ""
            for suffix, content in (("cls", b"1"), ("png", png(number)[:700])):
                info = tarfile.TarInfo(f"{folder}{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def contents(path: Path, url: str | None = None) -> list[object]:
    return [image.content for image in Shards([url or str(path)], 1).read(0)]


def indexed(path: Path) -> list[object]:
    images = TarImages([str(path)])
    return [images[place].content for place in range(len(images))]


def outcome(read: Callable[[], list[object]]) -> list[object] | str:
    try:
        return read()
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1500
        return str(error)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_tarfile_writes_is_read_as_tarfile_reads_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(archive(kind))
    with tarfile.open(path) as tar:
        expected = {name: tar.extractfile(name).read() for name in tar.getnames() if name.endswith("png")}  # type: ignore[union-attr]
    assert len(expected) == 4
    found = {image.name: image.content for image in Shards([str(path)], 4)}
    assert found == {f"{path}/{name}": content for name, content in expected.items()}
    images = TarImages([str(path)])
    assert {images[place].name: images[place].content for place in range(4)} == found
    for suffix, pack in PACKERS.items():
        packed = tmp_path / f"a.tar.{suffix}"
        packed.write_bytes(pack(path.read_bytes()))
        assert contents(packed) == contents(packed, f"pipe:cat {packed}") == list(expected.values())


def headers(kind: str) -> Iterator[int]:
    """Where the headers of the archive begin, those of extensions among them, and its end mark."""
    content, place = archive(kind), 0
    while content[place]:
        yield place
        place += 512 + -(-int(content[place + 124 : place + 135], 8) // 512) * 512
    yield place


@pytest.mark.parametrize("kind", FORMATS)
def test_no_flipped_bit_in_a_header_loses_an_image_silently(kind: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "a.tar", archive(kind)
    path.write_bytes(whole)
    expected = contents(path)
    places = [start + offset for start in headers(kind) for offset in range(0, 512, 13)]
    errors = 0
    for number, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << number % 8
        path.write_bytes(damaged)
        for found in (outcome(lambda: contents(path)), outcome(lambda: indexed(path))):
            assert found == expected or isinstance(found, str), (place, number % 8)
            errors += isinstance(found, str)
    assert errors > len(places)


def test_a_pipe_and_a_packed_shard_tell_of_damage_too(tmp_path: Path) -> None:
    whole = bytearray(archive())
    whole[list(headers("ustar"))[4] + 3] ^= 4
    for name, content in {"a.tar": bytes(whole), "a.tar.gz": gzip.compress(whole)}.items():
        (tmp_path / name).write_bytes(content)
        for url in (str(tmp_path / name), f"pipe:cat {tmp_path / name}"):
            found = outcome(lambda url=url: contents(tmp_path, url))  # type: ignore[misc]
            assert isinstance(found, str) and found.startswith(f"{url}: cannot be read beyond its first 2 images (")


def test_cuts_joins_and_lost_blocks_are_noticed(tmp_path: Path) -> None:
    whole, path = archive(), tmp_path / "a.tar"
    starts = list(headers("ustar"))
    cases = {
        "cut between members": whole[: starts[3]],
        "cut at the end mark": whole[: starts[-1]],
        "a header of zeros": whole[: starts[3]] + bytes(512) + whole[starts[3] + 512 :],
        "two joined archives": whole + archive("gnu"),
        "empty": b"",
        "cut within a header": whole[: starts[3] + 100],
        "cut within an image": whole[: starts[3] + 600],
    }
    for what, content in cases.items():
        path.write_bytes(content)
        for read in (lambda: contents(path), lambda: indexed(path), lambda: contents(path, f"pipe:cat {path}")):
            assert isinstance(outcome(read), str), what


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)


def hostile(what: str) -> bytes:
    giga = 10 << 30
    pax = b"22 GNU.sparse.major=1\n" + b"22 GNU.sparse.minor=0\n"
    negative = bytearray(header("b.png", 0))
    negative[124:136] = b"\xff" * 10 + b"\xfc\x00"
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    return {
        "claims": header("a.png", giga) + END,
        "name": header("././@LongLink", giga, b"L") + END,
        "long name": header("././@LongLink", MIB, b"L") + b"x" * (MIB - 5) + b".png\0" + header("a", 0) + END,
        "pax": header("x", giga, b"x") + END,
        "link": header("x", giga, b"K") + END,
        "sparse": header("a.png", 0, b"S") + END,
        "pax sparse": header("x", len(pax), b"x") + pax.ljust(512, b"\0") + header("a.png", 0) + END,
        "negative": bytes(negative) + END,
        "many extensions": header("x", 0, b"x") * 5000 + header("a.png", 1 << 60) + END,
        "negative pax": header("x", 13, b"x") + b"13 size=-512\n".ljust(512, b"\0") + header("a.png", 0) + END,
        "twice": (header("a.png", 1) + b"1".ljust(512, b"\0")) * 2 + END,
    }[what]


HOSTILE = ["claims", "name", "pax", "link", "sparse", "negative", "twice", "long name", "pax sparse", "negative pax"]


@pytest.mark.parametrize("what", [*HOSTILE, "many extensions"])
def test_headers_that_mean_harm_are_one_line(what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(hostile(what))
    assert isinstance(outcome(lambda: contents(path)), str)
    assert isinstance(outcome(lambda: indexed(path)), str)


@pytest.mark.parametrize("packed", [False, True])
def test_a_member_of_gigabytes_takes_no_memory(tmp_path: Path, packed: bool) -> None:
    """One that is there, as a hole of the disk or as compressed zeros."""
    path = tmp_path / "a.tar"
    size = (2 << 30) + 512
    if packed:
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(header("a.png", size))
            for _ in range(64):
                file.write(bytes(MIB))
    else:
        with path.open("wb") as plain:
            plain.write(header("a.png", size))
            plain.truncate(size + 2048)
    said = run_limited(lambda: outcome(lambda: contents(path)) + outcome(lambda: indexed(path)), memory=100 * MIB)
    assert f"a.png claims {size} bytes, and an image has 1073741824 at most" in said


def test_long_names_do_not_pad_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, {**{f"{number}.png": b"" for number in range(20_000)}, "x/" * 2000 + "y.png": b""})
    assert run_limited(lambda: len(TarImages([str(path)])), memory=60 * MIB) == "20001"


def test_shards_that_go_away_during_a_run(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(archive())
    images, shards = TarImages([str(path)]), Shards([str(path)], 4)
    path.write_bytes(archive()[:1500])
    assert "its shard was cut off" in str(images[3].content)
    path.unlink()
    assert str(images[0].content) == "FileNotFoundError: No such file or directory"
    with pytest.raises(UserError, match="cannot be read beyond its first 0 images .FileNotFoundError"):
        list(shards)


def test_a_command_that_fails_after_the_last_image_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(archive())
    with pytest.raises(UserError, match="exit 3"):
        list(Shards([f"pipe:cat {tmp_path}/a.tar; sleep 0.2; exit 3"], 4))
    with pytest.raises(UserError, match="exit 3"):
        list(Shards(["pipe:exit 3"], 4))
    stream = Shards([f"pipe:cat {tmp_path}/a.tar /dev/zero"], 4).read(0)
    next(stream)
    stream.close()  # in the middle, which the command does not survive


def check_mutations(tmp_path: Path, seeds: range) -> None:
    path = tmp_path / "a.tar"
    sources = [archive(kind) for kind in FORMATS]
    for seed in seeds:
        source = sources[seed % 3]
        damaged = mutate(source, seed, sources[(seed + 1) % 3])
        if seed % 4 == 3:
            damaged = mutate(gzip.compress(source), seed)
        path.write_bytes(damaged)
        outcome(lambda: contents(path))
        outcome(lambda: indexed(path))


def test_mutations(tmp_path: Path) -> None:
    check_mutations(tmp_path, range(400))


@pytest.mark.slow
def test_ten_thousand_mutations(tmp_path: Path) -> None:
    check_mutations(tmp_path, range(1000, 11_000))
