"""Damaged images: whatever decoders raise, the reason is one line; values that overflow never reach a network."""

import io
import json
import os
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from mutations import mutate
from PIL import Image
from tiny_runs import SMALL
from valid_images import valid_files

from spark_me import cli
from spark_me.config.data import DataConfig, FinetuneDataConfig
from spark_me.data import arrays, reading
from spark_me.data.commands import examine, measure
from spark_me.data.datasets import HeldOutDataset, Reader, TrainDataset
from spark_me.data.reading import Encoded, read_image
from spark_me.data.transforms import augmentation, centre_crop, held_out_transform, train_transform
from spark_me.data.unreadable import UnreadableImage, reason_of
from spark_me.downstream.preprocessing import recipe_preprocessing
from spark_me.errors import UserError


def reason(item: Encoded | Path, channels: int, data: DataConfig | None = None) -> str | None:
    return examine(item, channels, data or DataConfig()).reason


def test_valid_files_are_read() -> None:
    """Else their damaged copies would prove little."""
    files = valid_files()
    read = 0
    for name, content in files.items():
        reasons = [reason(Encoded(name, content), channels) for channels in (1, 3, 5)]
        assert None in reasons or "pixels are not 8 bits" in str(reasons) or "has" in str(reasons), (name, reasons)
        read += None in reasons
    assert read > 100


def test_damaged_files_are_read_or_have_a_reason_of_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(5)
    files = list(valid_files().items())
    for seed in range(250):
        name, content = files[generator.integers(len(files))]
        why = reason(Encoded(name, mutate(content, seed)), int(generator.choice([1, 3, 5])))
        assert why is None or (why and len(why.splitlines()) == 1 and len(why) < 300), name
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        KeyError("several\nlines"),
        MemoryError(),
        RecursionError("too deep"),
        StopIteration(),
        RuntimeError("x" * 5000),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    ],
)
def test_whatever_a_decoder_raises_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    monkeypatch.setattr(tifffile, "TiffFile", fail)
    monkeypatch.setattr(np.lib.format, "read_magic", fail)
    for name, channels in (("a.png", 3), ("a.tif", 5), ("a.npy", 4)):
        with pytest.raises(UnreadableImage) as caught:
            read_image(Encoded(name, b"content"), channels)
        assert str(caught.value).startswith(type(error).__name__) and len(str(caught.value).splitlines()) == 1
    monkeypatch.setattr(reading.arrays, "upright", fail)
    with pytest.raises(UserError, match=r"^the image: unreadable \(") as refused:
        recipe_preprocessing(3, resnet=True).prepare(Image.new("RGB", (8, 8)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_interruptions_are_no_reasons(signal: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise signal

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(signal):
        read_image(Encoded("a.png", b""), 3)


def test_reason_names_what_happened_once() -> None:
    assert reason_of(FileNotFoundError(2, "No such file or directory", "/a/b")) == (
        "FileNotFoundError: No such file or directory"
    )
    assert reason_of(ValueError("a\n  b\tc")) == "ValueError: a b c"


# Values that overflow.


@pytest.mark.parametrize("value", [1e38, -1e38, -3.4028234663852886e38, 1e31, 1e300])
@pytest.mark.parametrize("kind", [".npy", ".tif"])
def test_values_that_overflow_are_refused_by_every_reader(tmp_path: Path, value: float, kind: str) -> None:
    dtype = np.float64 if abs(value) > 4e38 else np.float32
    pixels = np.random.default_rng(0).random((40, 50, 4)).astype(dtype)
    pixels[7, 8] = value
    path = tmp_path / f"a{kind}"
    np.save(path, pixels) if kind == ".npy" else tifffile.imwrite(
        path, pixels, photometric="minisblack", planarconfig="contig"
    )
    data = DataConfig(mean=[0.5] * 4, std=[0.25] * 4, crop_scale=[1.0, 1.0])
    why = reason(path, 4, data)
    assert why is not None and "too large to compute with" in why and "data.nodata=" in why
    assert measure(path, 4, None) is None
    trained = TrainDataset([path], Reader(train_transform(data, (32, 32), 4), seed=0, channels=4))[(0, 0)]
    held_out = HeldOutDataset([path], Reader(held_out_transform(data, (32, 32), 4), seed=0, channels=4))[0]
    assert trained.image is None and held_out.image is None
    assert trained.unreadable == held_out.unreadable == [(str(path), why)]
    # The value that the reason gives is the one to set.
    nodata = float(why.rpartition("data.nodata=")[2])
    image = read_image(path, 4, nodata)
    assert isinstance(image, torch.Tensor) and image.isnan().sum() == 4
    assert reason(path, 4, DataConfig(nodata=nodata, mean=data.mean, std=data.std)) is None


@pytest.mark.parametrize("label", [False, True])
def test_values_far_from_the_mean_are_refused_once_that_is_known(tmp_path: Path, label: bool) -> None:
    pixels = np.full((40, 50, 2), 1e8, dtype=np.float32)
    np.save(tmp_path / "a.npy", pixels)
    common = {"mean": [0.0] * 2, "std": [1e-6] * 2}
    data = DataConfig(**common)
    transform = (
        augmentation(FinetuneDataConfig(train_crop=32, **common), 2) if label else train_transform(data, (32, 32), 2)
    )
    sample = TrainDataset([tmp_path / "a.npy"], Reader(transform, seed=0, channels=2))[(0, 0)]
    assert sample.image is None and "deviations from the mean" in sample.unreadable[0][1]
    assert reason(tmp_path / "a.npy", 2, data) == sample.unreadable[0][1]
    usual = DataConfig(mean=[1e8] * 2, std=[1.0] * 2)
    assert reason(tmp_path / "a.npy", 2, usual) is None


def test_large_finite_values_are_measured_exactly() -> None:
    pixels = np.random.default_rng(0).random((9, 8, 2)) * 1e29
    moments = measure(Encoded("a", pixels.astype(np.float32)), 2, None)
    assert moments is not None
    np.testing.assert_allclose(moments.mean, pixels.mean(axis=(0, 1)), rtol=1e-6)
    assert np.isfinite(moments.squares).all()
    assert arrays.LARGEST == 1e30


def test_image_that_would_be_enlarged_beyond_measure_is_refused() -> None:
    """A line of pixels, whose short edge of 1 a test crop would make 236 times as long."""
    Image.new("RGB", (100_000, 1)).save(content := BytesIO(), "PNG")
    transform = centre_crop(FinetuneDataConfig(test_resize=236, test_crop=224), 3)
    sample = HeldOutDataset([Encoded("line.png", content.getvalue())], Reader(transform, seed=0))[0]
    assert sample.image is None
    assert sample.unreadable == [("line.png", "too elongated: 100000 by 1 pixels")]


# Names that are no UTF-8, and terminals that know no umlauts.


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_are_no_text_where_output_is_strict(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """`data check`, a run with its list, metrics and pictures, as under PYTHONIOENCODING=…:strict."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / os.fsdecode(b"caf\xe9 %d.png" % number))
    bad = folder / os.fsdecode(b"\xff\xfe.png")
    bad.write_bytes(b"no image")
    content = {
        "model": {"encoder": SMALL, "image_size": [32, 64], "decoder_width": 32},
        "data": {"root": str(folder), "workers": 0, "max_unreadable": 0.5, "held_out": 1},
        "optim": {"name": "adamw", "warmup_epochs": 0},
        "train": {"epochs": 1, "batch_size": 6},
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    assert cli.main(["data", "check", str(tmp_path / "c.yaml")]) == 1
    sys.stdout.flush()
    assert b".png\tno image of a known format\n7 images, 1 unreadable" in written.getvalue()
    assert cli.main(["data", "check", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "bad.txt")]) == 1
    assert (tmp_path / "bad.txt").read_bytes() == os.fsencode(bad) + b"\tno image of a known format\n"
    assert cli.main(["data", "stats", str(tmp_path / "c.yaml"), "--json", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["unreadable"] == 1
    assert cli.main(["pretrain", str(tmp_path / "c.yaml")]) == 0
    listed = (tmp_path / "run" / "unreadable.txt").read_bytes()
    assert listed == os.fsencode(bad) + b"\tno image of a known format\n"
    assert cli.main(["pretrain", str(tmp_path / "c.yaml")]) == 0  # which reads the list in the checkpoint


def test_folder_whose_name_is_no_utf8_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("model: {encoder: resnet18}\n")
    assert cli.main(["data", "check", str(tmp_path / "c.yaml"), "data.root=" + os.fsdecode(b"caf\xe9")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "caf\\udce9" in line and "is no UTF-8 text" in line
