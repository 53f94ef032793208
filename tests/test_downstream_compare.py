"""`spark-me compare` on tiny images: which runs it makes, what it keeps, and when it goes on."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_finetune import write_classes, write_config
from tiny_runs import RESNET

import spark_me
from spark_me import cli
from spark_me.config.loading import load_config
from spark_me.config.tasks import FinetuneConfig
from spark_me.downstream import compare as module
from spark_me.downstream.compare import SIDES, Comparison, Row, Trial, cells_of, compare
from spark_me.downstream.finetune import finetune
from spark_me.errors import UserError
from spark_me.tables import text_table
from spark_me.train.logs import read_metrics
from spark_me.train.starting_weights import settle_images
from spark_me.train.step import Stepper


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Maps of a few pixels."""


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    write_classes(tmp_path / "images")
    torch.manual_seed(5)
    torch.save(spark_me.get_model(RESNET).state_dict(), tmp_path / "pretrained.pth")
    overrides = [f"weights={tmp_path / 'pretrained.pth'}", "train.epochs=1", "run.seed=3"]
    return load_config(write_config(tmp_path), overrides, schema=FinetuneConfig)


def message_of(config: FinetuneConfig, fractions: list[float], seeds: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        compare(config, fractions, seeds)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_run_is_what_finetune_makes_of_its_configuration(
    config: FinetuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(config, [0.5, 1.0], 2)
    said = capsys.readouterr().out
    run = Path(config.run.dir)
    trials = json.loads((run / "comparison.json").read_text())["trials"]
    assert {(t["start"], t["fraction"], t["seed"]) for t in trials} == {
        (start, fraction, seed) for start in ("pretrained", "scratch") for fraction in (0.5, 1.0) for seed in (3, 4)
    }
    assert {(t["fraction"], t["images"]) for t in trials} == {(0.5, 6), (1.0, 12)}
    # One of each start, again, by the command that users have for it.
    for start, weights in (("pretrained", config.weights), ("scratch", "none")):
        own = [f"weights={weights}", "data.fraction=0.5", "run.seed=4", "train.epochs=1", f"run.dir={tmp_path / start}"]
        finetune(load_config(write_config(tmp_path), own, schema=FinetuneConfig))
        expected = read_metrics(tmp_path / start / "metrics.jsonl")
        assert read_losses(run / f"{start}_0.5_seed4") == [entry["loss"] for entry in expected if "loss" in entry]
        (trial,) = (t for t in trials if (t["start"], t["fraction"], t["seed"]) == (start, 0.5, 4))
        assert trial["top1"] == expected[-1]["held_out_top1"]
    assert said.count("top-1") == 8 and "ranges of the seeds" in said
    assert (run / "comparison.png").stat().st_size > 1000
    assert (run / "comparison.md").read_text().count("\n") == 4
    assert not list(run.glob("*/checkpoints")), "finished runs keep no checkpoints"
    assert "starting from random weights" in (run / "scratch_0.5_seed3" / "output.txt").read_text()


def read_losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]


def test_a_signal_stops_it_and_it_goes_on(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[tuple[str, bool]] = []
    step = Stepper.take

    def step_under_a_signal(self: Stepper, *arguments: Any) -> Any:
        if len(runs) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    def finetune_and_note(own: FinetuneConfig) -> bool:
        runs.append((Path(own.run.dir).name, finetune(own)))
        return runs[-1][1]

    monkeypatch.setattr(Stepper, "take", step_under_a_signal)
    monkeypatch.setattr(module, "finetune", finetune_and_note)
    compare(config, [1.0], 1)
    assert runs == [("pretrained_1_seed3", True), ("scratch_1_seed3", False)]
    assert capsys.readouterr().out.splitlines()[-1] == "stopped as asked: repeat the command to go on"
    compare(config, [1.0], 1)
    assert runs[2:] == [("scratch_1_seed3", True)], "the finished run is not done again"
    assert "going on from" in (Path(config.run.dir) / "scratch_1_seed3" / "output.txt").read_text()


def test_a_folder_belongs_to_one_configuration_and_one_file_of_weights(config: FinetuneConfig) -> None:
    settle_images(config.data, config.model.in_channels, config.weights, "weights=")
    comparison = Comparison(Path(config.run.dir), config, Path(config.weights))
    comparison.add(Trial("scratch", 1.0, 3, 12, 0.5))
    config.optim.base_lr *= 2
    assert "optim.base_lr: 0.02 → 0.04" in message_of(config, [1.0])
    config.optim.base_lr /= 2
    torch.save(spark_me.get_model(RESNET).state_dict(), config.weights)
    assert "pretrained.pth changed since" in message_of(config, [1.0])
    (Path(config.run.dir) / "comparison.json").write_text("{")
    assert "cannot be read" in message_of(config, [1.0])


def test_input_that_does_not_fit(config: FinetuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--fractions 0 1.5" in message_of(config, [0.0, 0.5, 1.5])
    assert "--seeds 0" in message_of(config, [1.0], seeds=0)
    config.data.fraction = 0.5
    assert "--fractions" in message_of(config, [1.0])
    arguments = [str(tmp_path / "tiny.yaml"), "--fractions", "1", "--seeds", "1"]
    assert cli.main(["compare", *arguments]) == 2
    assert "weights=none" in capsys.readouterr().err
    assert cli.main(["compare", arguments[0], f"weights={tmp_path / 'no.pth'}", *arguments[1:]]) == 2
    assert "no.pth" in capsys.readouterr().err
    assert not Path(config.run.dir).exists()


def test_rows_say_whether_the_seeds_lie_apart() -> None:
    better = Row(0.01, 14, pretrained=[0.72, 0.76, 0.74], scratch=[0.60, 0.71, 0.64])
    overlap = Row(0.1, 140, pretrained=[0.9, 0.8], scratch=[0.85, 0.7])
    worse = Row(1.0, 1400, pretrained=[0.9], scratch=[0.95])
    assert [row.verdict for row in (better, overlap, worse)] == ["better", "overlap", "worse"]
    lines = text_table(cells_of([better, overlap, worse]), SIDES).splitlines()
    # The standard deviation of 2, -2, 0 is 2; of the differences 12, 5, 10 it is 3.6.
    assert " ".join(lines[1].split()) == "1 % 14 74.0 ± 2.0 % 65.0 ± 5.6 % +9.0 ± 3.6 apart"
    assert " ".join(lines[3].split()) == "100 % 1400 90.0 % 95.0 % -5.0 apart, scratch is better"
