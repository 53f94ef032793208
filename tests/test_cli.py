"""The command line: one grammar for all commands, and one line for whatever is wrong or missing."""

import argparse
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import tiny_runs
import torch

import spark_me
from spark_me import cli
from spark_me.cli import _parser

CONFIGS = Path(__file__).parents[1] / "configs"
OPTIONAL = (
    "PIL", "datasets", "elpv_dataset", "matplotlib", "omegaconf", "onnx", "onnxruntime", "onnxscript", "safetensors",
    "sklearn", "skimage", "tensorboard", "tifffile", "timm", "torchvision", "tqdm", "webdataset", "yaml",
)  # fmt: skip
"""Modules of all packages that only optional groups of setup.py bring."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny_runs.write_config(tmp_path / "tiny.yaml", tiny_runs.write_images(tmp_path / "images"))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command with bad input ends in."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("spark-me: error: ")


def run_python(code: str, *, folder: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("place", range(4))
def test_key_and_value_may_stand_anywhere(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    words = [str(config), "--out", str(tmp_path / "list.txt")]
    words.insert(place, "data.held_out=1")
    assert cli.main(["data", "check", "model.in_channels=1", *words, "data.workers=0"]) == 0
    assert capsys.readouterr().out.startswith("10 images, 0 unreadable")


def test_key_and_value_behind_an_option_of_several_values(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = CONFIGS / "finetune" / "small.yaml"
    arguments = ["compare", tiny, "--fractions", "0.5", "weights=none", "--seeds", "2", "data.root=x"]
    assert error_of(capsys, *arguments).startswith("weights=none: name the pretrained weights")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--train.epochs", "3"], "train.epochs=3"),
        (["--train.epochs=3"], "train.epochs=3"),
        (["--epochs", "3"], "train.epochs=3"),
        (["--batch-size", "8"], "train.batch_size=8"),
        (["--lr=1e-3"], "optim.lr=1e-3"),
        (["--flip"], "data.flip=VALUE"),
    ],
)
def test_dashes_before_a_key_are_answered(
    config: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], answer: str
) -> None:
    for line in ([config, *words], [*words, config]):
        message = error_of(capsys, "pretrain", *line)
        assert message.startswith(words[0].partition("=")[0]) and f"did you mean {answer}?" in message


def test_mistyped_option_is_answered_with_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", CONFIGS / "finetune" / "small.yaml", "--weights", "w.pt", "--jsn", "x.json"]
    assert error_of(capsys, *arguments) == "--jsn: no such option: did you mean --json?"


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "compare", CONFIGS / "finetune" / "small.yaml", "weights=w.pt", "--seed", "3")
    assert "run.seed=3" in message or "--seeds" in message


def test_configuration_is_named_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, "pretrain", "data.root=x").startswith("no configuration: name one, for example spark-me")
    assert error_of(capsys, "pretrain", config, "other.yaml").startswith(f"more than one configuration ({config}, ")


def test_a_path_may_hold_an_equals_sign(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.parent / "lr=3"
    folder.mkdir()
    assert cli.main(["data", "check", str(config.rename(folder / "tiny.yaml"))]) == 0


def test_commands_without_a_configuration_take_no_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "a.pt", "b.pt", "--to", "timm", "data.root=x"])
    assert stop.value.code == 2 and "unrecognized arguments: data.root=x" in capsys.readouterr().err


@pytest.fixture(scope="module")
def without_torch() -> dict[str, list]:
    """What is answered in a process of its own, and whether torch is imported afterwards."""
    lines = {"--version": ["--version"]}
    for command in CHECKED:
        task = "finetune" if command in ("finetune", "compare", "evaluate") else "pretrain"
        weights = ["--weights", "w.pt"] if command == "evaluate" else []
        overrides = ["train.epoch=3", "weights=none"]
        lines[command] = [*command.split(), str(CONFIGS / task / "small.yaml"), *overrides, *weights]
    code = f"""
import contextlib, io, json, sys, spark_me
sys.modules["requests"] = sys.modules["pypi_simple"] = None  # the group engine alone brings them
answers = {{"dir": [dir(spark_me), "torch" in sys.modules]}}
from spark_me import cli
for name, line in {lines}.items():
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        try: answer = cli.main(line)
        except SystemExit: answer = stream.getvalue()
    answers[name] = [answer, "torch" in sys.modules]
print(json.dumps(answers))
"""
    return json.loads(run_python(code))


CHECKED = ["pretrain", "finetune", "compare", "evaluate", "data check", "data stats"]


@pytest.mark.parametrize("command", CHECKED)
def test_configuration_is_checked_before_torch_is_imported(without_torch: dict[str, list], command: str) -> None:
    assert without_torch[command] == [2, False]


def test_versions_are_those_installed(without_torch: dict[str, list]) -> None:
    version, imported = without_torch["--version"]
    assert version.startswith(f"spark-me {spark_me.__version__} (torch {torch.__version__.partition('+')[0]}")
    assert "MinkowskiEngine 0.5.4" in version and not imported


def test_options_of_a_command_that_is_one_function_are_its_parameters() -> None:
    found = set()
    for command, parser in commands_of(_parser()):
        run = parser.get_default("run")
        if isinstance(run, partial):
            parameters = inspect.signature(pkgutil.resolve_name(*run.args)).parameters
            options = {action.dest for action in parser._actions} - {"help"}
            kinds = {parameter.kind for parameter in parameters.values()}
            assert options <= parameters.keys() or inspect.Parameter.VAR_KEYWORD in kinds, command
            found.add(command)
    assert {"predict", "features", "probe", "reconstruct", "engine install", "data digits"} <= found


def commands_of(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """All commands with their parsers."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each, own in action.choices.items():
                yield from commands_of(own, f"{name} {each}".strip())
    yield name, parser


def test_names_that_are_imported_later_are_listed(without_torch: dict[str, list]) -> None:
    named, imported = without_torch["dir"]
    assert {"get_model", "load_weights", "SparseEncoder", "build_model"} <= set(named)
    assert not imported


def test_import_from_the_folder_above_a_clone(tmp_path: Path) -> None:
    """Where Python could take the clone, a folder called spark_me, for the package."""
    (tmp_path / "spark_me" / "spark_me").mkdir(parents=True)
    said = run_python("import spark_me; print(spark_me.__version__)", folder=tmp_path)
    assert said.strip() == spark_me.__version__


def test_missing_packages_are_named_with_their_group(config: Path, tmp_path: Path) -> None:
    """Every command where torch alone is installed."""
    spark_me_file, image = tmp_path / "w.pt", next((tmp_path / "images").iterdir())
    spark_me_file.touch()
    finetune = [str(CONFIGS / "finetune" / "small.yaml"), "data.root=x"]
    lines = {
        "pretrain": ["pretrain", str(config)],
        "finetune": ["finetune", *finetune],
        "compare": ["compare", *finetune],
        "evaluate": ["evaluate", *finetune, "--weights", "w.pt"],
        "reconstruct": ["reconstruct", str(spark_me_file), str(image)],
        "predict": ["predict", str(spark_me_file), str(image)],
        "features": ["features", str(spark_me_file), str(image), "--out", str(tmp_path / "f.npz")],
        "probe": ["probe", str(spark_me_file), "--train", str(tmp_path), "--test", str(tmp_path)],
        "export": ["export", str(spark_me_file), str(tmp_path / "m.onnx"), "--to", "onnx"],
        "bench": ["bench"],
        "data check": ["data", "check", str(config)],
        "data stats": ["data", "stats", str(config)],
        "data digits": ["data", "digits", str(tmp_path / "digits")],
        "data fetch": ["data", "fetch", "texture", str(tmp_path / "texture")],
        "schedule": ["schedule", str(config)],
    }
    code = f"""
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
from spark_me import cli
from spark_me.cli import _parser
said = {{}}
for name, line in {lines}.items():
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        said[name] = [cli.main(line), stream.getvalue()]
print(json.dumps(said))
"""
    said = json.loads(run_python(code).splitlines()[-1])
    groups = {"predict": "inference", "features": "inference", "probe": "probe", "export": "export"}
    groups |= {"data digits": "demo", "data fetch": "evidence"}
    for name, (code, text) in said.items():
        group = groups.get(name, "train")
        assert code == 2 and text.count("\n") == 1, (name, text)
        assert f'run `pip install -e ".[{group}]"` in the folder of spark_me\'s setup.py' in text, (name, text)
    # Converting needs torch alone.
    assert cli.main(["convert", str(spark_me_file), str(tmp_path / "c.pt"), "--to", "timm"]) == 2


def test_nothing_offers_an_installation_from_an_index() -> None:
    root = Path(__file__).parents[1]
    for path in [*root.glob("spark_me/**/*.py"), *root.glob("docs/*.md"), root / "README.md"]:
        text = path.read_text(encoding="utf-8")
        assert "pip install spark_me" not in text and "pip install 'spark_me" not in text, path


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "not writable" in error_of(capsys, "data", "digits", tmp_path / "closed" / "digits")
