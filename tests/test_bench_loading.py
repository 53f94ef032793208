"""`spark-me bench --scope data`: what is timed, by a fake clock, and the command as typed."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark_me.bench import loading
from spark_me.bench.loading import BATCHES, DECODING, Loading, compare_loading, loader_of, make_photo, time_loader
from spark_me.cli import main
from spark_me.data import arrays
from spark_me.data.datasets import Batch
from spark_me.data.listing import Paths
from spark_me.errors import UserError

QUICK = "bench --scope data --batch 2 --image-size 64 --runs 1 --warmup 0"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        make_photo((300, 400), number).save(folder / f"{number}.jpg")
    return folder


def test_the_clock_leaves_out_the_batches_before_it_starts():
    now = [0.0]

    def batches():
        for seconds in (100, 50, 1, 2, 4):
            now[0] += seconds
            yield Batch(torch.empty(0), [], [])

    assert time_loader(batches(), 2, lambda: now[0]) == 7
    with pytest.raises(UserError, match=r"a\.jpg: cannot be read \(cut off\)"):
        time_loader([Batch(torch.empty(0), [], [("a.jpg", "cut off")])], 1)


def test_figures_are_of_the_batches_that_were_timed():
    seconds = {
        (0, "whole"): [2.0, 4.0, 9.0],
        (0, "reduced"): [1.0, 2.0, 2.0],
        (2, "whole"): [2.0],
        (2, "reduced"): [4.0],
    }
    zero, reduced, two, slow = compare_loading(Loading(batch=16), seconds)
    assert (zero["median"], zero["fastest"], zero["slowest"]) == (4, 2, 9)
    assert zero["images_per_second"] == BATCHES * 16 / 4
    assert two["images_per_second"] == 2 * BATCHES * 16 / 2
    assert [row["speed_to_whole"] for row in (zero, reduced, two, slow)] == [1, 2, 1, 0.5]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_is_that_of_training_and_decodes_as_it_says(photos: Path, workers: int, monkeypatch):
    sizes = set()
    load = arrays.load
    monkeypatch.setattr(arrays, "load", lambda image: (load(image), sizes.add((image.height, image.width))))
    case = Loading(batch=4, image_size=(64, 96))
    images = Paths(sorted(photos.iterdir()))  # fewer than a batch
    found = {}
    for name, draft in DECODING.items():
        sizes.clear()
        found[name] = list(loader_of(case, images, workers, draft=draft))
        if not workers:
            assert (sizes == {(300, 400)}) != draft and (not draft or min(sizes) < (300, 400))
        assert len(found[name]) == (BATCHES + 1) * max(1, workers)
        for batch in found[name]:
            assert batch.images.shape == (4, 3, 64, 96) and batch.images.dtype == torch.uint8
            assert batch.visible is not None and batch.visible.shape == (4, 2, 3)
    assert [batch.indices for batch in found["whole"]] == [batch.indices for batch in found["reduced"]]


def test_rounds_interleave_and_warmup_does_not_count(photos: Path, monkeypatch):
    timed = []

    def noted(loader, lead):
        timed.append((loader.num_workers, loader.dataset.reader.reduction is not None, lead))
        return float(len(timed))

    monkeypatch.setattr(loading, "time_loader", noted)
    announced = []
    case = Loading(workers=(0, 3), batch=2, image_size=(64, 64), root=str(photos))
    record = loading.measure_loading(case, runs=2, warmup=1, advance=announced.append)
    assert timed == [(0, False, 1), (0, True, 1), (3, False, 3), (3, True, 3)] * 3
    assert len(announced) == 12 and announced[3] == "warm-up 3 workers, reduced"
    assert [row["seconds"] for row in record["scopes"][0]["rows"]] == [[5, 9], [6, 10], [7, 11], [8, 12]]


def test_made_photos_are_photos():
    photo = make_photo((375, 500), 1)
    assert photo.size == (500, 375) and photo.mode == "RGB"
    assert np.array_equal(np.asarray(photo), np.asarray(make_photo((375, 500), 1)))
    assert not np.array_equal(np.asarray(photo), np.asarray(make_photo((375, 500), 2)))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=loading.QUALITY)
    assert 2**16 < file.tell() < 2**17  # of ImageNet's, the mean is 110 KB
    blocks = np.asarray(photo.convert("L").resize((25, 20), Image.Resampling.BOX), dtype=float)
    assert blocks.std() > 20 > np.abs(np.diff(blocks)).mean()


def test_command_prints_writes_and_leaves_nothing(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loading, "PHOTOS", 3)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    target = tmp_path / "data.json"
    assert main([*QUICK.split(), "--workers", "0", "1", "--photo-size", "200", "300", "--json", str(target)]) == 0
    assert list(tmp_path.iterdir()) == [target]
    content = json.loads(target.read_text())
    assert {"Pillow", "libjpeg-turbo", "torch", "spark_me"} <= {*content["machine"]["versions"]}
    (result,) = content["scopes"]
    names = [(row["workers"], row["decoding"]) for row in result["rows"]]
    assert names == [(0, "whole"), (0, "reduced"), (1, "whole"), (1, "reduced")]
    printed = capsys.readouterr().out
    assert "3 images made, 200×300 pixels, crops of 64×64 pixels, batch 2\n" in printed
    assert all(f"{row['images_per_second']:.1f}" in printed for row in result["rows"])
    assert main(["bench", "--table", str(target)]) == 0
    assert "| 200×300 | 64×64 | 2 | 1 | reduced |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *[(option, option.split()[0]) for option in ("--encoder resnet18", "--dtype float16", "--backends dense")],
        *[(option, option.split()[0]) for option in ("--no-memory", "--no-compile", "--largest-batch", "--plot a.png")],
        ("--sweep batch", "--sweep is not for --scope data"),
        ("--scope step --workers 1", "--workers is for --scope data"),
        ("--scope encoder --root photos", "--root is for --scope data"),
        ("--workers 1 -1", "--workers -1"),
        ("--root nowhere", "--root nowhere: no such folder"),
        ("--root .", "--root .: no images in there"),
        ("--photo-size 4", "--photo-size 4 4"),
        ("--photo-size 1 2 3", "--photo-size 1 2 3"),
        ("--image-size 100", "no multiple of the encoder's patch size 32"),
        ("--batch 0", "--batch 0"),
        ("--runs 0", "--runs 0"),
        ("--json nowhere/bench.json", "nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK.split(), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())


def test_unreadable_image_is_named(photos: Path, capsys):
    (photos / "cut.jpg").write_bytes((photos / "0.jpg").read_bytes()[:2000])
    assert main([*QUICK.split(), "--workers", "0", "--root", str(photos)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cut.jpg: cannot be read" in error
