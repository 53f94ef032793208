"""Damaged configurations: files, what they inherit from, arguments, and the records of checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest
from memory import memory_below
from mutations import mutate

from spark_me.config.loading import load_config, parse_config, to_yaml
from spark_me.config.tasks import FinetuneConfig, PretrainConfig
from spark_me.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
SEEDS, MANY = 60, 10_000
OVERRIDES = ["data.crop_scale=[0.2, 1.0]", "train.epochs=3", "data.mean=[0.1, 0.2, 0.3]", "run.dir=runs/x"]


def one_line(act: Callable[..., object], *arguments: object) -> None:
    try:
        act(*arguments)
    except UserError as error:
        assert str(error) and "\n" not in str(error)


def attack_file(folder: Path, seeds: range) -> None:
    base = (CONFIGS / "pretrain" / "small.yaml").read_bytes()
    path, heir = folder / "x.yaml", folder / "heir.yaml"
    heir.write_text("base: x.yaml\ndata: {root: a}")
    for seed in seeds:
        path.write_bytes(mutate(base, seed))
        one_line(load_config, path, ["data.root=a"])
        one_line(load_config, heir)


def attack_record(schema: type[PretrainConfig] | type[FinetuneConfig], seeds: range) -> None:
    config = schema()
    config.data.root = "a"
    content = to_yaml(config).encode()
    for seed in seeds:
        text = mutate(content, seed).decode(errors="surrogateescape")
        one_line(parse_config, text, "x.pt", schema)


def attack_arguments(seeds: range) -> None:
    path = CONFIGS / "pretrain" / "small.yaml"
    for seed in seeds:
        word = mutate(OVERRIDES[seed % len(OVERRIDES)].encode(), seed).decode(errors="surrogateescape")
        one_line(load_config, path, ["data.root=a", word])


def test_damaged_configurations_are_one_line(tmp_path: Path) -> None:
    with memory_below(200):
        attack_file(tmp_path, range(SEEDS))
        attack_record(PretrainConfig, range(SEEDS))
        attack_record(FinetuneConfig, range(SEEDS))
        attack_arguments(range(SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "pretrain", "finetune", "arguments"])
def test_many_damaged_configurations_are_one_line(tmp_path: Path, kind: str) -> None:
    with memory_below(200):
        if kind == "files":
            attack_file(tmp_path, range(MANY))
        elif kind == "arguments":
            attack_arguments(range(MANY))
        else:
            attack_record(PretrainConfig if kind == "pretrain" else FinetuneConfig, range(MANY))
