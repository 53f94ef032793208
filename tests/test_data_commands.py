"""`spark-me data stats` and `data check`, and a thousand images of which a hundred are damaged."""

import json
import os
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tar_shards import png, write_shard, write_shards
from tiny_runs import SMALL

from spark_me import cli
from spark_me.config.loading import load_config
from spark_me.data.unreadable import as_lines

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(images: Path | str, channels: int = 3, **data: object) -> Path:
        content = {
            "model": {"encoder": SMALL, "image_size": [32, 64], "decoder_width": 32, "in_channels": channels},
            "data": {"root": str(images), "workers": 0, **data},
            "optim": {"name": "adamw", "warmup_epochs": 0},
            "train": {"epochs": 1, "batch_size": 100},
            "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "c.yaml"

    return write


def noise(seed: int, shape: tuple[int, ...] = (40, 40, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Statistics.


def save_photos(folder: Path) -> list[np.ndarray]:
    folder.mkdir()
    arrays = [noise(seed, (20 + seed, 30, 3)) // (seed + 1) for seed in range(7)]
    for seed, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{seed}.png")
    return arrays


@pytest.mark.parametrize("workers", [0, 2])
def test_stats_of_whole_photos(tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    arrays = save_photos(tmp_path / "images")
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    out = tmp_path / "stats.json"
    assert cli.main(["data", "stats", str(write(tmp_path / "images", workers=workers)), "--json", str(out)]) == 0
    values = np.concatenate([array.reshape(-1, 3) for array in arrays]) / 255
    figures = json.loads(out.read_text())
    np.testing.assert_allclose(figures["mean"], values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(figures["std"], values.std(axis=0), rtol=1e-12)
    assert (figures["images"], figures["unreadable"], figures["pixels"]) == (7, 1, len(values))
    printed = yaml.safe_load(capsys.readouterr().out)["data"]
    np.testing.assert_allclose(printed["mean"], values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(printed["std"], values.std(axis=0), rtol=1e-5)


def test_stats_of_many_channels_leave_nodata_out_and_survive_large_offsets(tmp_path: Path, write: Write) -> None:
    (tmp_path / "images").mkdir()
    arrays = []
    for seed in range(4):
        array = np.random.default_rng(seed).normal(1e5, 1, (30, 20, 5)).astype(np.float32)
        array[: 5 * seed] = np.nan
        np.save(tmp_path / "images" / f"{seed}.npy", array)
        arrays.append(array.reshape(-1, 5))
    values = np.concatenate(arrays).astype(np.float64)
    config, out = write(tmp_path / "images", 5, nodata=float("nan")), tmp_path / "stats.json"
    assert cli.main(["data", "stats", str(config), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    np.testing.assert_allclose(figures["mean"], np.nanmean(values, axis=0), rtol=1e-12)
    np.testing.assert_allclose(figures["std"], np.nanstd(values, axis=0), rtol=1e-9)
    assert figures["pixels"] == np.isfinite(values[:, 0]).sum()


def test_stats_of_a_sample(tmp_path: Path, write: Write) -> None:
    arrays = save_photos(tmp_path / "images")
    arguments = ["data", "stats", str(write(tmp_path / "images")), "--json", str(tmp_path / "s.json"), "--sample"]
    assert cli.main([*arguments, "2"]) == 0
    values = np.concatenate([arrays[place].reshape(-1, 3) for place in (1, 5)]) / 255
    np.testing.assert_allclose(json.loads((tmp_path / "s.json").read_text())["mean"], values.mean(axis=0), rtol=1e-12)
    assert cli.main([*arguments, "0"]) == 2


def test_missing_statistics_name_the_command_that_measures_them(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, 4)
    assert cli.main(["pretrain", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.mean=null" in line and "spark-me data stats" in line
    assert load_config(write(tmp_path, 1)).data.mean == [0.449]
    assert load_config(write(tmp_path, 3)).data.std == [0.229, 0.224, 0.225]


# Checking.


def test_check_of_sound_images(tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    save_photos(tmp_path / "images")
    Image.fromarray(noise(0, (100, 90))).save(tmp_path / "images" / "grey.png")
    assert cli.main(["data", "check", str(write(tmp_path / "images", workers=2))]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    expected = "height×width smallest / median / largest 20×30 / 24×30 / 100×90; stored as RGB (7), L (1)"
    assert line == f"8 images, 0 unreadable; {expected}"


def test_check_of_held_out_images_and_empty_ones(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", np.full((8, 8, 4), -1, dtype=np.int16))
    np.save(tmp_path / "images" / "b.npy", np.full((8, 8, 4), 1, dtype=np.int16))
    config = write(tmp_path / "images", 4, nodata=-1, val_root=str(tmp_path / "images"))
    assert cli.main(["data", "check", str(config)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{tmp_path / 'images' / 'a.npy'}\tnodata: no pixel has data"] * 2
    assert lines[2].startswith("4 images, 2 unreadable") and lines[2].endswith("4×int16 (2)")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_measured_and_checked(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    pattern = write_shards(tmp_path)
    write_shard(tmp_path / "04.tar", {"x.png": b"no image", "y.png": png(99)})
    config = write(pattern.replace("03}", "04}"), kind="webdataset", workers=workers)
    assert cli.main(["data", "stats", str(config), "--json", str(tmp_path / "s.json")]) == 0
    values = np.stack([np.asarray(Image.open(BytesIO(png(number)))) for number in (*range(24), 99)]) / 255
    figures = json.loads((tmp_path / "s.json").read_text())
    np.testing.assert_allclose(figures["mean"], values.mean(axis=(0, 1, 2)), rtol=1e-12)
    capsys.readouterr()
    assert cli.main(["data", "check", str(config)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / '04.tar'}/x.png\tno image of a known format"
    assert lines[1].startswith("26 images, 1 unreadable")


# A hundred damaged among a thousand.


def encoded(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def huge_png_header() -> bytes:
    """A PNG that says it has 100,000 × 100,000 pixels."""
    whole = bytearray(encoded(Image.new("RGB", (8, 8)), "PNG"))
    whole[16:24] = (100_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


def damaged_contents() -> list[tuple[str, bytes]]:
    """Suffix and content of nine kinds; the tenth is a link that leads nowhere."""
    jpeg, png = (encoded(Image.fromarray(noise(1)), name) for name in ("JPEG", "PNG"))
    side = int((Image.MAX_IMAGE_PIXELS * 1.2) ** 0.5)
    return [
        (".jpg", b""),
        (".jpg", jpeg[: len(jpeg) // 2]),
        (".png", png[: len(png) // 2]),
        (".jpg", b"a text that somebody renamed"),
        (".png", b"\0\0\0\0" + png[4:]),  # wrong magic
        (".jpg", b"\0" * 5000),
        (".png", png[:33]),  # header alone
        (".png", encoded(Image.new("1", (side, side)), "PNG")),  # decompression bomb
        (".png", huge_png_header()),
    ]


def test_a_hundred_damaged_of_a_thousand_images(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    contents = damaged_contents()
    damaged = set()
    good = [encoded(Image.fromarray(noise(seed)), "JPEG" if seed % 2 else "PNG") for seed in range(10)]
    for number in range(1000):
        path = folder / f"{number:04}"
        kind = number // 10 % 10
        if number % 10 != 3:
            path.with_suffix(".jpg" if number % 2 else ".png").write_bytes(good[number % 10])
        elif kind == len(contents):
            path = path.with_suffix(".jpg")
            path.symlink_to(folder / "nowhere")
            damaged.add(str(path))
        else:
            suffix, content = contents[kind]
            path.with_suffix(suffix).write_bytes(content)
            damaged.add(str(path.with_suffix(suffix)))
    assert len(damaged) == 100
    assert len(os.listdir(folder)) == 1000
    config = write(folder, max_unreadable=0.1)
    assert cli.main(["pretrain", str(config)]) == 0
    listed = dict(line.split("\t") for line in (tmp_path / "run" / "unreadable.txt").read_text().splitlines())
    assert listed.keys() == damaged
    assert all(listed.values())
    assert len({reason.partition(":")[0] for reason in listed.values()}) >= 4
    capsys.readouterr()
    assert cli.main(["data", "check", str(config), "--out", str(tmp_path / "bad.txt")]) == 1
    assert (tmp_path / "bad.txt").read_text() == (tmp_path / "run" / "unreadable.txt").read_text()
    assert capsys.readouterr().out.startswith("1000 images, 100 unreadable; ")


def test_line_breaks_in_names_forge_no_lines() -> None:
    assert as_lines([("b\n/etc/passwd", "no\timage"), ("a", "cut")]) == "a\tcut\nb\\n/etc/passwd\tno\\timage\n"
