"""Every command that draws progress, on terminals of 80 and of 100 columns, and the demo from a clean clone."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tiny_finetune
import tiny_runs
from terminal import Recording, record, record_command

from spark_me import cli
from spark_me.engine.build import Progress

REPOSITORY = Path(__file__).parents[1]
TINY_BENCH = (
    f"bench --encoder {tiny_runs.RESNET} --batch 2 --image-size 64 --mask-ratio 0.5 --decoder-width 32 --device cpu"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[80, 100])
def columns(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, columns: int) -> Path:
    """Images without and with labels, and a configuration for each."""
    folder = tmp_path_factory.mktemp("terminal")
    tiny_runs.write_config(folder / "pretrain.yaml", tiny_runs.write_images(folder / "plain"), encoder=tiny_runs.SMALL)
    tiny_finetune.write_classes(folder / "images")
    tiny_finetune.write_config(folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


def typed(*arguments: object, columns: int) -> Recording:
    recording = record(lambda: cli.main([str(argument) for argument in arguments]), columns)
    recording.assert_tidy(columns)
    assert recording.code == 0, recording.raw
    return recording


@pytest.fixture(scope="module")
def pretraining(folder: Path, columns: int) -> Recording:
    return typed("pretrain", folder / "pretrain.yaml", f"run.dir={folder / 'pretrained'}", columns=columns)


@pytest.fixture(scope="module")
def finetuning(folder: Path, columns: int) -> Recording:
    return typed("finetune", folder / "tiny.yaml", "train.epochs=1", columns=columns)


def bars(recording: Recording, word: str) -> list[str]:
    """What is left on the screen of a bar that shows a word."""
    return [line for line in recording.screen if word in line and "|" in line]


def test_pretraining_draws_one_bar_of_its_steps(pretraining: Recording) -> None:
    (bar,) = bars(pretraining, "step")
    assert bar.startswith("epoch 2/2 |") and "| step 8/8, loss 0." in bar and "images/s" in bar
    assert bar.endswith("00:00 left")
    lines = [line for line in pretraining.screen if " · held-out loss " in line]
    assert [line.partition(" · loss")[0] for line in lines] == ["epoch 1/2 · step 4", "epoch 2/2 · step 8"]


def test_fine_tuning_draws_one_bar_of_its_steps(finetuning: Recording) -> None:
    (bar,) = bars(finetuning, "step")
    assert "step 3/3, loss" in bar and bar.endswith("left")


def test_comparing_draws_a_bar_for_each_run(folder: Path, finetuning: Recording, columns: int) -> None:
    weights = f"weights={folder / 'run' / 'checkpoints' / 'best.pt'}"
    arguments = ["compare", folder / "tiny.yaml", weights, "train.epochs=1", f"run.dir={folder / 'compared'}"]
    recording = typed(*arguments, "--fractions", 1, "--seeds", 1, columns=columns)
    assert len(bars(recording, "step 3/3")) == 2
    assert any("apart" in line or "overlap" in line for line in recording.screen)


def test_commands_over_labelled_images_draw_a_bar(folder: Path, finetuning: Recording, columns: int) -> None:
    weights = folder / "run" / "checkpoints" / "best.pt"
    images = folder / "images"
    evaluated = typed("evaluate", folder / "tiny.yaml", "--weights", weights, columns=columns)
    assert bars(evaluated, "evaluating: 100%")
    predicted = typed("predict", weights, images / "val", columns=columns)
    assert bars(predicted, "predicting: 100%")
    features = typed("features", weights, images / "val", "--out", folder / "f.npz", columns=columns)
    assert bars(features, "features: 100%")
    options = ("--train", images / "train", "--test", images / "val")
    probed = typed("probe", weights, *options, columns=columns)
    assert len(bars(probed, "100%")) == 2


def test_commands_over_plain_images_draw_a_bar(folder: Path, digits: Path, columns: int) -> None:
    assert bars(typed("data", "check", folder / "pretrain.yaml", columns=columns), "checking: 100%")
    assert bars(typed("data", "stats", folder / "pretrain.yaml", columns=columns), "measuring: 100%")
    assert "writing digits" in typed("data", "digits", digits, columns=columns).raw


def test_benchmark_draws_a_bar_and_clears_it(columns: int) -> None:
    options = "--scope encoder --backends native --runs 1 --warmup 0 --no-memory"
    recording = typed(*TINY_BENCH.split(), *options.split(), columns=columns)
    assert "native" in recording.raw and not bars(recording, "/")


def test_build_redraws_its_line(columns: int) -> None:
    def build() -> int:
        progress = Progress("building MinkowskiEngine 0.5.4", sys.stderr)
        for number in range(1, 14):
            progress.read(f"[{number}/13] c++ -c convolution_transpose_cpu.cpp")
            progress.tick()
        progress.close()
        return 0

    recording = record(build, columns)
    assert len(recording.screen) == 1 and "13/13 files" in recording.screen[0]


def share_bytecode(environment: Path) -> None:
    """What Python compiled of the same packages for the environment of the tests: compiling takes half a minute."""
    for cache in Path(sysconfig.get_path("purelib")).rglob("__pycache__"):
        place = environment / cache.relative_to(sys.prefix)
        if place.parent.is_dir() and not place.exists():
            place.symlink_to(cache)


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="no checkout to clone")
def test_demo_from_a_clean_clone(tmp_path: Path) -> None:
    """The first command of the README as a newcomer gives it, but for the length of the run."""
    clone = tmp_path / "spark_me"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    variables = {"PYTHON": sys.executable}
    recording = record_command(["make", "setup"], 80, folder=clone, variables=variables)
    assert recording.code == 0, recording.raw
    share_bytecode(clone / ".venv")
    short = "ARGS=train.epochs=2 data.repeats=2 model.image_size=[64,64] run.dir=runs/short"
    # As the newcomer has it: all cores, and no thread for each of several test processes; idle ones do not spin.
    variables |= {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1"}
    recording = record_command(["make", "demo", short], 80, folder=clone, variables=variables)
    recording.assert_tidy(80)
    assert recording.code == 0, recording.raw
    assert len(bars(recording, "step")) == 1, recording.raw
    written = {path.name for path in (clone / "runs/short").iterdir()}
    assert {"reconstruction.png", "loss.png", "checkpoints"} <= written
