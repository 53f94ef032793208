"""Random checkpoints of published keys and shapes (data/checkpoint_layouts: xz, one `key<TAB>shape` a line)."""

import lzma
import math
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

LAYOUT_FILES = sorted((Path(__file__).parent / "data" / "checkpoint_layouts").glob("*.tsv.xz"))
WHOLE_MODELS = [path for path in LAYOUT_FILES if "withdecoder" in path.name or "spark_sparse" in path.name]


def encoder_of(layout_file: Path) -> str:
    return re.search(r"resnet\d+|convnext(v2)?[-_][a-z]+", layout_file.name)[0].replace("-", "_")


def is_resnet(layout_file: Path) -> bool:
    return encoder_of(layout_file).startswith("resnet")


def published_shapes(layout_file: Path) -> dict[str, tuple[int, ...]]:
    with lzma.open(layout_file, "rt") as file:
        lines = [line.partition("\t") for line in file.read().splitlines()]
    return {key: tuple(int(size) for size in sizes.split("x") if size) for key, _, sizes in lines}


def random_checkpoint(layout_file: Path, seed: int = 0) -> dict[str, Tensor]:
    return random_state(published_shapes(layout_file), seed)


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights, norm weights away from one, norm statistics away from zero and one, counters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        # Every tensor is another piece of one long noise: drawing 90 million numbers anew takes seconds.
        start = int(torch.randint(1 << 21, (), generator=generator))
        noise = _noise()[start : start + math.prod(shape)].reshape(shape).clone()
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(start)
        elif key.endswith("running_var"):
            state[key] = noise.abs() + 0.5
        elif len(shape) > 1:
            state[key] = noise * (2 / noise[0].numel()) ** 0.5
        else:
            state[key] = noise * 0.2 + (1 if key.endswith("weight") else 0)
    return state


@cache
def _noise() -> Tensor:
    return torch.randn(12 << 20, generator=torch.Generator().manual_seed(0))


def random_like(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    return random_state({key: tuple(tensor.shape) for key, tensor in state.items()}, seed)


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key


def module_of(state: dict[str, Tensor]) -> nn.Module:
    """A module that holds these tensors, norm statistics as buffers."""
    root = nn.Module()
    for key, tensor in state.items():
        *path, leaf = key.split(".")
        place = root
        for name in path:
            if name not in dict(place.named_children()):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        if leaf.startswith(("running_", "num_")):
            place.register_buffer(leaf, tensor)
        else:
            place.register_parameter(leaf, nn.Parameter(tensor))
    return root
