"""`spark-me data digits`: scikit-learn's images, whole, in folders of their digits."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from tiny_runs import RESNET

from spark_me import cli
from spark_me.config.tasks import FinetuneConfig
from spark_me.data.class_folders import find_labelled
from spark_me.data.commands import write_digits


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "digits"
    assert cli.main(["data", "digits", str(folder)]) == 0
    return folder


def test_digits_are_split_once_and_look_like_the_originals(written: Path) -> None:
    config = FinetuneConfig().data
    config.root = str(written)
    train, val, classes = find_labelled(config, seed=0)
    assert classes == [str(digit) for digit in range(10)]
    digits = load_digits()
    places = [int(path.stem) for path in (*train.paths, *val.paths)]
    assert sorted(places) == list(range(1797)), "every image is in one of the two parts"
    assert [*train.labels, *val.labels] == digits.target[places].tolist()
    of_val = np.bincount(val.labels)
    assert (np.abs(of_val / np.bincount(digits.target) - 0.2) < 0.005).all()
    for path in val.paths[::40]:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (64, 64))
            means = np.asarray(image, dtype=float).reshape(8, 8, 8, 8).mean(axis=(1, 3))
        original = digits.images[int(path.stem)]
        assert np.corrcoef(means.ravel(), original.ravel())[0, 1] > 0.97


def test_what_is_there_already_stays(written: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in written.rglob("*.png")}
    next(iter(times)).unlink()
    write_digits(written)
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == [next(iter(times))]


def test_a_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "digits").write_text("")
    assert cli.main(["data", "digits", str(tmp_path / "digits")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_demo_in_few_steps(
    tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """The commands of `make demo-finetune`, as it types them, but shorter, with a smaller network."""
    (tmp_path / "runs/demo_finetune").mkdir(parents=True)
    (tmp_path / "runs/demo_finetune/digits").symlink_to(written)
    configs = Path(__file__).parents[1] / "configs" / "demo"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "digits", "runs/demo_finetune/digits"]) == 0
    short = ["train.steps=2", "train.batch_size=64", f"model.encoder={RESNET}"]
    assert cli.main(["pretrain", str(configs / "digits_pretrain.yaml"), *short]) == 0
    short += ["--fractions", "0.01", "--seeds", "1"]
    assert cli.main(["compare", str(configs / "digits_finetune.yaml"), *short]) == 0
    trials = json.loads(Path("runs/demo_finetune/compare/comparison.json").read_text())["trials"]
    assert [(trial["start"], trial["images"]) for trial in trials] == [("pretrained", 10), ("scratch", 10)]
