"""Damaged files of JSON: measurements, comparisons, curves, and those of a data set."""

import json
from pathlib import Path

import pytest
from memory import memory_below
from mutations import mutate

from spark_me.bench.report import markdown_of
from spark_me.config.loading import to_yaml
from spark_me.config.tasks import FinetuneConfig
from spark_me.downstream.compare import Comparison
from spark_me.errors import UserError
from spark_me.train.logs import MetricsFile, read_metrics

SEEDS, MANY = 150, 10_000
ROW = {
    "backend": "dense",
    "memory_format": "channels_last",
    "compiled": False,
    "yardstick": True,
    "seconds": [1.0, 2.0],
    "median": 1.5,
    "fastest": 1.0,
    "slowest": 2.0,
    "images_per_second": 5.0,
    "speed_to_masked_dense": 1.2,
    "speed_to_dense": None,
    "ratio_to_floor": 1.0,
    "activation_bytes": 1 << 20,
    "activation_ratio": 0.4,
}
MACHINE = {"date": "2026-01-02T03:04:05", "gpu": None, "processor": "x", "threads": 2, "versions": {"torch": "2.11"}}
CASE = {"encoder": "resnet50", "batch": 8, "image_size": [224, 224], "dtype": "float32", "mask_ratio": 0.6}
TIMES = {
    "machine": MACHINE,
    "case": CASE,
    "scopes": [{"scope": "encoder", "rows": [ROW], "left_out": {"native": "no"}, "floor_seconds": 1.0, "tables": None}],
}
BATCHES = {
    "machine": MACHINE,
    "case": CASE,
    "scope": "encoder",
    "gpu_bytes": 1 << 33,
    "largest": [{"backend": "masked_dense", "memory_format": None, "batch": 64, "limit": "memory"}],
}


def attack_tables(path: Path, seeds: range) -> None:
    contents = [json.dumps(content, indent=2).encode() for content in (TIMES, BATCHES)]
    for seed in seeds:
        path.write_bytes(mutate(contents[seed % 2], seed))
        try:
            markdown_of([path])
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def attack_comparison(folder: Path, seeds: range) -> None:
    weights = folder / "weights.pth"
    weights.write_bytes(b"weights")
    config = FinetuneConfig(weights=str(weights))
    config.data.root = "a"
    trial = {"start": "scratch", "fraction": 1.0, "seed": 0, "images": 9, "top1": 0.5}
    content = json.dumps({"config": to_yaml(config), "weights_sha256": "x", "trials": [trial]}).encode()
    for seed in seeds:
        (folder / "comparison.json").write_bytes(mutate(content, seed))
        try:
            Comparison(folder, config, weights).rows([1.0], [])
        except UserError as error:
            assert str(folder) in str(error) and "\n" not in str(error)


def attack_curves(path: Path, seeds: range) -> None:
    lines = "".join(json.dumps({"step": step, "loss": 1 / step, "held_out_loss": 2.5}) + "\n" for step in range(1, 30))
    for seed in seeds:
        path.write_bytes(mutate(lines.encode(), seed))
        for entry in read_metrics(path):
            assert type(entry["step"]) is int
        MetricsFile(path, 20)
        for line in path.read_text().splitlines():
            json.loads(line)


ATTACKS = {"tables": attack_tables, "comparison": attack_comparison, "curves": attack_curves}


@pytest.mark.parametrize("kind", ATTACKS)
def test_damaged_json_is_a_result_or_one_line(tmp_path: Path, kind: str) -> None:
    with memory_below(200):
        ATTACKS[kind](tmp_path / "x.json" if kind != "comparison" else tmp_path, range(SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ATTACKS)
def test_much_damaged_json_is_a_result_or_one_line(tmp_path: Path, kind: str) -> None:
    with memory_below(200):
        ATTACKS[kind](tmp_path / "x.json" if kind != "comparison" else tmp_path, range(MANY))


def test_the_files_are_valid(tmp_path: Path) -> None:
    for content, word in ((TIMES, "forward and backward"), (BATCHES, "largest batch")):
        (tmp_path / "x.json").write_text(json.dumps(content))
        assert word in markdown_of([tmp_path / "x.json"])
