"""Damaged images of every format, and files that would have another program run."""

import faulthandler
import os
import signal
import stat
from io import BytesIO
from pathlib import Path

import pytest
import torch
from child import MIB, run_limited
from mutations import mutate
from PIL import EpsImagePlugin, Image
from valid_images import valid_files

from spark_me.config.data import DataConfig
from spark_me.data.commands import examine
from spark_me.data.datasets import Reader, TrainDataset
from spark_me.data.loaders import visit
from spark_me.data.reading import Encoded
from spark_me.data.transforms import train_transform
from spark_me.errors import UserError
from spark_me.train.distributed import named_failures


def check_mutations(seeds: range) -> None:
    """Every outcome is an image or a reason of one line, as `data check` and as training see it."""
    files = [(name, content) for name, content in valid_files().items() if not name.endswith((".npy", ".tif"))]
    assert len({Path(name).suffix for name, _ in files}) > 20
    reader = Reader(train_transform(DataConfig(), (32, 32)), seed=0)

    def read_all() -> int:
        read = 0
        for seed in seeds:
            name, content = files[seed % len(files)]
            other = files[(seed + seed // len(files) % 7) % len(files)][1]
            item = Encoded(name, mutate(content, seed, other))
            why = examine(item, 3, DataConfig()).reason
            assert why is None or (why and len(why.splitlines()) == 1 and len(why) < 400), (name, seed, why)
            if seed % 4 == 0:
                sample = TrainDataset([item], reader)[(0, 0)]
                assert (sample.image is None) == (why is not None) or "elongated" in str(sample.unreadable)
            read += why is None
        return read

    assert int(run_limited(read_all, memory=1024 * MIB, seconds=600)) > len(seeds) / 20


def test_mutations(one_thread: None) -> None:
    check_mutations(range(400))


@pytest.mark.slow
def test_ten_thousand_mutations(one_thread: None) -> None:
    check_mutations(range(1000, 11_000))


# Other programs.


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is there once a program of that name was called."""
    trace, program = tmp_path / "trace", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\necho 10.0\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trace


def saved(kind: str, **options: object) -> bytes:
    file = BytesIO()
    Image.effect_noise((40, 30), 50).convert("RGB").save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def test_postscript_reaches_no_ghostscript_by_any_name(ghostscript: Path) -> None:
    eps = saved("EPS")
    with pytest.raises(OSError), Image.open(BytesIO(eps)) as image:
        image.load()
    assert ghostscript.exists()  # Pillow itself would call it
    ghostscript.unlink()
    jpeg, tiff, mpo = (
        saved("JPEG"),
        saved("TIFF"),
        saved("MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    )
    preview = b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + len(eps).to_bytes(4, "little") + bytes(18) + eps
    for content in (
        eps,
        preview,
        jpeg[:600] + eps,
        jpeg + eps,
        tiff[:8] + eps,
        mpo.replace(mpo[-800:], eps[:800]),
        mpo + eps,
    ):
        for suffix in ("jpg", "mpo", "tif", "png", "eps", "ps", "npy", "ico", "icns", "psd", "blp", "webp"):
            for channels in (1, 3, 4):
                examine(Encoded(f"a.{suffix}", content), channels, DataConfig())
    assert not ghostscript.exists()
    assert examine(Encoded("a.jpg", eps), 3, DataConfig()).reason == "no image of a known format"


def test_every_image_is_opened_by_named_formats() -> None:
    """Else Pillow would try all of them, PostScript among them."""
    package = Path(__file__).parents[2] / "spark_me"
    opened = [line for path in package.rglob("*.py") for line in path.read_text().splitlines() if "Image.open(" in line]
    assert len(opened) >= 3 and all("formats=" in line for line in opened)


# Workers.


def test_a_worker_hands_on_what_went_wrong_with_an_image(tmp_path: Path) -> None:
    items = []
    for number, (name, content) in enumerate(valid_files().items()):
        path = tmp_path / f"{number}{name}"
        path.write_bytes(mutate(content, number))
        items.append(path)
    dataset = TrainDataset(items, Reader(train_transform(DataConfig(), (32, 32)), seed=0), most_unreadable=0)
    keys = [(0, index) for index in range(len(items))]
    loader = torch.utils.data.DataLoader(dataset, sampler=keys, batch_size=None, num_workers=1)
    assert sum(sample.image is None for sample in loader) == sum(dataset[key].image is None for key in keys) > 20


def die(item: object) -> str:
    """Of the third image, as a decoder in C does."""
    if str(item) == "2.png":
        faulthandler.disable()  # pytest's, which would print all its frames
        os.kill(os.getpid(), signal.SIGABRT)
    if str(item) == "fails.png":
        raise RuntimeError("DataLoader worker is all that this has in common with a death")
    return str(item)


def test_a_worker_that_dies_is_named_with_the_images_that_it_had() -> None:
    images = [Path(f"{number}.png") for number in range(6)]
    with pytest.raises(UserError) as caught:
        list(visit(images, die, workers=1, what="checking"))
    assert "died (DataLoader worker (pid" in str(caught.value) and "signal: Aborted" in str(caught.value)
    assert "2.png" in str(caught.value) and "memory" not in str(caught.value)
    assert list(visit([Path("0.png")], die, workers=1, what="checking")) == ["0.png"]


def test_an_error_in_a_worker_is_no_death() -> None:
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker process 0"), named_failures():
        list(visit([Path("fails.png")], die, workers=1, what="checking"))
