"""Damaged files of weights, in every layout and of every kind: tensors, or one line."""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path

import pytest
import torch
from memory import memory_below
from mutations import mutate
from safetensors.torch import save
from torch import Tensor

from spark_me.errors import UserError
from spark_me.weights.canonical import to_canonical
from spark_me.weights.expected import require_numbers
from spark_me.weights.files import card_of, read_content, read_state, write_state
from spark_me.weights.layouts import LAYOUTS

SEEDS, MANY = 300, 10_000
SUFFIXES = {"safetensors": ".safetensors", "digest": ".safetensors"}


def some_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn1.num_batches_tracked": torch.tensor(3),
        "bn1.bias": torch.randn(4, generator=generator).half(),
    }


@cache
def valid(kind: str) -> bytes:
    """A whole file of a kind."""
    file, state = BytesIO(), some_state()
    if kind == "safetensors":
        return save(state, metadata={"format": "pt"})
    if kind == "legacy":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        file.write(pickle.dumps(OrderedDict(a=1, b=[2.5, "c"])))
    elif kind == "checkpoint":
        torch.save({"format": "spark_me.finetune", "model": state, "config": "model: {}", "classes": ["a"]}, file)
    else:
        torch.save({"state_dict": state, "meta": {"epoch": 3}}, file)
    return file.getvalue()


def try_reading(path: Path) -> bool:
    """Whether it is a state dict; all else must be one line."""
    try:
        state = read_state(path)
        require_numbers(state, str(path))
        to_canonical(state, str(path))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    return True


def attack(path: Path, content: bytes, seeds: range) -> None:
    with memory_below(500):
        for seed in seeds:
            path.write_bytes(mutate(content, seed))
            try_reading(path)


KINDS = ("torch", "legacy", "pickle", "checkpoint", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_tensors_or_one_line(tmp_path: Path, kind: str) -> None:
    attack(tmp_path / f"x{SUFFIXES.get(kind, '.pth')}", valid(kind), range(SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_give_tensors_or_one_line(tmp_path: Path, kind: str) -> None:
    attack(tmp_path / f"x{SUFFIXES.get(kind, '.pth')}", valid(kind), range(MANY))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damage_to_what_we_wrote_changes_no_value(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_state(path, some_state(), LAYOUTS[0], {"encoder": "resnet18"})
    content, expected = path.read_bytes(), read_content(path)
    assert isinstance(expected, Mapping)
    for seed in range(SEEDS):
        path.write_bytes(mutate(content, seed))
        try:
            card_of(path, read_content(path))
            state = read_state(path)
        except UserError:
            continue
        for name in state.keys() & some_state().keys():
            assert torch.equal(state[name], some_state()[name]), seed
