"""Text from outside at every place that takes weights: URLs, names of files, classes and tensors that mean harm.

Each ends in a result or in one line and exit code 2; the terminal gets no control characters, and nothing is written
but what was asked for.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_runs
import torch
from classifier_files import fine_tuned
from file_server import Server, serving
from PIL import Image
from tiny_finetune import write_classes, write_config

import spark_me
from spark_me import cli
from spark_me.config.loading import load_config, to_yaml
from spark_me.config.tasks import FinetuneConfig
from spark_me.downstream.evaluate import plot_confusion
from spark_me.downstream.predict import draw_sheet
from spark_me.downstream.preprocessing import recipe_preprocessing
from spark_me.train.logs import quoted

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn", "shallow")

ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202e"
CLASSES = sorted(
    ["a" + ESCAPES + "\nb", "c" * 250, "$\\frac{$ %n {x}", b"\xff\xfe \xe7\x8c\xab".decode(errors="surrogateescape")]
)
"""As names of folders; the longest that a folder may have."""


class Place:
    """A folder with images and configurations, and what each entry point does there with some weights."""

    def __init__(self, home: Path) -> None:
        self.home, self.out = home, home / "out"
        self.out.mkdir(parents=True)
        write_classes(home / "images", train=2, val=2, classes=CLASSES)
        self.image = home / "images" / "val" / CLASSES[0] / "0.png"
        write_config(home, "resnet18")
        tiny_runs.write_config(home / "pretrain.yaml", tiny_runs.write_images(home / "plain"), epochs=1)
        self.before = self.files()

    def files(self) -> set[str]:
        """All that lies here and beside, by name and content, the folder of results aside."""
        walk = [each for each in os.walk(self.home.parent) if not Path(each[0]).is_relative_to(self.out)]
        paths = (Path(folder, name) for folder, _, names in walk for name in names)
        return {f"{os.path.relpath(path, self.home)} {hash(path.read_bytes())}" for path in paths}

    def new_files(self) -> set[str]:
        """Where files were written, the folder of results aside."""
        return {name.partition(" ")[0] for name in self.files() - self.before}

    def run(self, entry: str, weights: str) -> int:
        """The exit code of a command, or what a script would exit with that prints an error's text."""
        if entry in FUNCTIONS:
            try:
                FUNCTIONS[entry](weights)
            except spark_me.UserError as error:
                print(error, file=os.sys.stderr)  # type: ignore[attr-defined]
                return 2
            return 0
        places = {"home": self.home, "out": self.out, "image": self.image, "weights": weights}
        return cli.main([word.format(**places) for word in COMMANDS[entry].split()])


COMMANDS = {
    "convert": "convert {weights} {out}/new.pth --to timm",
    "weights=": "finetune {home}/tiny.yaml train.epochs=1 run.dir={out}/run weights={weights}",
    "init_from": "pretrain {home}/pretrain.yaml run.dir={out}/pretrained model.init_from={weights}",
    "evaluate": "evaluate {home}/tiny.yaml --weights {weights} --json {out}/e.json --out {out}",
    "predict": "predict {weights} {image} --top-k 4 --json {out}/p.json --picture {out}/p.png",
    "features": "features {weights} {image} --out {out}/f.npz",
    "probe": "probe {weights} --train {home}/images/train --test {home}/images/val --json {out}/probe.json",
    "export": "export {weights} {out}/e.onnx --to onnx",
}
FUNCTIONS: dict[str, Callable[[str], object]] = {
    "get_model": lambda weights: spark_me.get_model("resnet18", pretrained=weights),
    "load_weights": lambda weights: spark_me.load_weights(resnet(), weights),
    "load_classifier": spark_me.load_classifier,
}


@cache
def resnet() -> torch.nn.Module:
    return spark_me.get_model("resnet18")


ENTRIES = [*COMMANDS, *FUNCTIONS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("outside") / "home")


@pytest.fixture(autouse=True)
def cache(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """torch.hub's cache, in the folder of results."""
    monkeypatch.setenv("TORCH_HOME", str(place.out / "torch"))
    monkeypatch.chdir(place.home)
    yield place.out / "torch" / "hub" / "checkpoints"
    subprocess.run(["rm", "-r", place.out], check=True)
    place.out.mkdir()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def classifier(place: Place) -> bytes:
    """The content of a fine-tuning checkpoint with the hostile names of classes."""
    path = place.out / "made.pt"
    fine_tuned(path, CLASSES, ema=None)
    content = torch.load(path, weights_only=True)
    content["config"] = to_yaml(load_config(place.home / "tiny.yaml", schema=FinetuneConfig))
    torch.save(content, path)
    data = path.read_bytes()
    path.unlink()
    return data


def assert_harmless(text: str) -> None:
    assert not [line for line in text.split("\n") if not line.isprintable()], repr(text)
    assert "Traceback" not in text


def assert_one_line(place: Place, entry: str, weights: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert place.run(entry, weights) == 2
    printed = capsys.readouterr()
    assert_harmless(printed.out + printed.err)
    (line,) = printed.err.splitlines()
    assert len(line) < 4100
    assert place.new_files() == set()
    assert not [path for path in place.out.rglob("*") if path.is_file() and path.suffix != ".pt"]
    return line


URLS = {
    "no URL": "http://[::1/x.pth",
    "no port": "http://127.0.0.1:x/x.pth",
    "a file": "file:///etc/passwd",
    "FTP": "ftp://127.0.0.1/x.pth",
    "no name": "http://127.0.0.1:1/a/..%2F..%2F",
    "a hidden name": "http://127.0.0.1:1/a/..%2F.pth",
    "no weights": "http://127.0.0.1:1/a/..%252F..%252Fstart.sh",
    "a NUL": "http://127.0.0.1:1/a%2500.pth",
    "escape codes": f"http://127.0.0.1:1/a{ESCAPES}.pth",
    "encoded escape codes": "http://127.0.0.1:1/a%1B%5B2J.pth",
    "no server": "http://127.0.0.1:1/..%2Fx.pth",
    "a long name": "http://127.0.0.1:1/" + "x" * 30_000 + ".pth",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_urls(place: Place, entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    for url in URLS.values():
        assert_one_line(place, entry, url, capsys)


@pytest.mark.parametrize("entry", ENTRIES)
def test_names_of_files(place: Place, entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (f"no{ESCAPES}.pth", f"no/{ESCAPES}", "x" * 5000 + ".pth", "x/" * 5000 + "y.pth", ESCAPES):
        assert_one_line(place, entry, name, capsys)
    path = place.out / f"damaged{ESCAPES}.pt"
    path.write_bytes(b"no checkpoint")
    assert "damaged" in assert_one_line(place, entry, str(path), capsys)


def hostile_contents(resnet: dict[str, torch.Tensor]) -> dict[str, object]:
    endless: dict[str, object] = {}
    endless["model"] = endless
    ours = {"format": "spark_me.finetune", "format_version": 2, "model": resnet, "classes": CLASSES}
    return {
        "keys of no layout": {f"{ESCAPES}\n{number}": torch.zeros(2) for number in range(40)},
        "keys of no model": {**resnet, f"layer1.{ESCAPES}": torch.zeros(2), "layer1." + "x" * 20_000: torch.zeros(2)},
        "keys that are no text": {**resnet, 7: torch.zeros(2), (1, ESCAPES): torch.zeros(2)},
        "entries that are no tensors": {**resnet, ESCAPES + "x" * 20_000: "text"},
        "an entry that holds itself": endless,
        "channels that take all memory": {**resnet, "conv1.weight": torch.zeros(1).expand(64, 10**11, 7, 7)},
        "classes that take all memory": {**resnet, "fc.weight": torch.zeros(1).expand(10**11, 512)},
        **{
            f"weights of {kind}": {**resnet, "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3).to(kind)}
            for kind in (torch.int32, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
        },
        "a counter of complex numbers": {**resnet, "bn1.num_batches_tracked": torch.tensor(1j)},
        **{
            f"weights that are {value}": {**resnet, "bn1.bias": torch.full((64,), value)}
            for value in (float("nan"), float("inf"))
        },
        "weights without values": {**resnet, "bn1.bias": torch.zeros(64, device="meta")},
        "sparse weights": {**resnet, "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3).to_sparse()},
        "images of 64,000 pixels": {**ours, "config": "model: {image_size: [64000, 64000]}\ndata: {}"},
        "test images of 64,000 pixels": {**ours, "config": "model: {}\ndata: {test_resize: 64000, test_crop: 64000}"},
        "shapes": {**resnet, "conv1.weight": torch.zeros([1] * 60), "bn1.weight": torch.zeros(0)},
        "a configuration that is none": {**ours, "config": f"{ESCAPES}: ["},
        "a configuration of other types": {
            **ours,
            "config": "model: {encoder: [1]}\ndata: {interpolation: {a: 1}, mean: abc}",
        },
        "a configuration of large numbers": {**ours, "config": "model: {}\ndata: {test_crop: 1" + "0" * 5000 + "}"},
        "classes that are none": {**ours, "classes": 7, "config": "model: {}\ndata: {test_resize: 9, test_crop: 9}"},
    }


@pytest.mark.parametrize("what", hostile_contents({}))
def test_contents_of_files(place: Place, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = place.out / "hostile.pt"
    torch.save(hostile_contents(resnet().state_dict())[what], path)
    of_ours = what.startswith(("a configuration", "images of", "test images", "classes that are none"))
    for entry in ["load_classifier", "predict", "evaluate"] if of_ours else ENTRIES:
        assert "hostile.pt" in assert_one_line(place, entry, str(path), capsys)


@pytest.mark.parametrize("entry", ENTRIES)
def test_classes_and_encoded_slashes_that_are_taken(
    place: Place, entry: str, server: Server, classifier: bytes, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All work, on harmless output, and the checkpoint lies in the cache."""
    name = "a/..%2F..%252F..%252F..%5C..%2Flib%2Fname.pth"
    server.files[name] = classifier
    assert place.run(entry, server.url(name)) == 0
    printed = capsys.readouterr()
    assert_harmless(printed.out + printed.err)
    (path,) = (path for path in cache.rglob("*") if path.is_file())
    assert path.name == "name.pth" and path.read_bytes() == classifier
    assert place.new_files() == set()
    check_results(entry, place)


def check_results(entry: str, place: Place) -> None:
    """The results hold the true names."""
    if entry == "predict":
        (row,) = json.loads((place.out / "p.json").read_text())
        assert row["image"] == str(place.image) and sorted(one["pred_class"] for one in row["top_k"]) == CLASSES
        assert Image.open(place.out / "p.png").height > 40
    elif entry == "evaluate":
        figures = json.loads((place.out / "e.json").read_text())
        assert [one["class"] for one in figures["classes"]] == CLASSES
        assert max(Image.open(place.out / "confusion.png").size) < 1000
    elif entry == "features":
        assert np.load(place.out / "f.npz")["paths"].tolist() == [str(place.image)]
    elif entry == "export":
        entries = {one.key: one.value for one in onnx.load(place.out / "e.onnx").metadata_props}
        assert json.loads(entries["classes"]) == CLASSES


def test_unreadable_images(place: Place, classifier: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (place.out / "some.pt").write_bytes(classifier)
    broken = place.out / f"x{ESCAPES}\ny.png"
    broken.write_bytes(b"no image")
    folders = [str(place.out), str(place.home / "images" / "val")]
    for command in (
        ["predict", str(place.out / "some.pt"), *folders],
        ["data", "check", str(place.home / "pretrain.yaml"), f"data.root={place.out}", "data.held_out=0"],
    ):
        assert cli.main(command) == 1
        printed = capsys.readouterr()
        assert_harmless(printed.out.replace("\t", " ") + printed.err)
        assert "unreadable" in printed.out + printed.err


@pytest.mark.parametrize("classes", [CLASSES, ["x" * 20_000, "$x^$", "_^", "\\"], [""] * 3])
def test_pictures_of_class_names(tmp_path: Path, classes: list[str]) -> None:
    plot_confusion(np.eye(len(classes), dtype=int).tolist(), classes, tmp_path / "c.png")
    assert max(Image.open(tmp_path / "c.png").size) < 1000
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    paths = [tmp_path / "a.png"] * len(classes)
    draw_sheet(paths, classes, recipe_preprocessing(3, resnet=True), tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").width < 1000


def test_names_of_results(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x" * 5000 + ".pth", f"no{ESCAPES}/x.pth", f"{ESCAPES}.txt"):
        assert cli.main(["convert", str(place.image), name, "--to", "timm"]) == 2
        printed = capsys.readouterr()
        assert_harmless(printed.out + printed.err)
        assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("name", [*CLASSES, "a b", "plain", "it's\n$(touch x) `y` \\ \"", "\x01" + "7"])
def test_paths_in_commands_are_words_of_the_shell(tmp_path: Path, name: str) -> None:
    word = quoted(Path("runs") / name)
    assert word.isprintable()
    said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True, cwd=tmp_path)
    assert os.fsdecode(said.stdout) == f"runs/{name}"
    assert os.listdir(tmp_path) == []
