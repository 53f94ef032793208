"""Layer-wise decay of the learning rate: the deeper a layer, the closer to the classifier's full rate.

The groups of ResNets and ConvNeXts are those of the published code. ResNets (SparK's own fine-tuning, the same in
mmpretrain): the stem is group 0, stage 1 is one group, stages 2 and 3 are groups of some consecutive blocks, stage 4 is
one group, and the classifier the last. ConvNeXts (the ConvNeXt paper's own fine-tuning, which SparK and mmpretrain
follow): stem, stages 1 and 2, every three blocks of stage 3, stage 4, and what comes after; a downsampling layer
belongs to the first group of the stage behind it. All other networks: the stem, every three blocks of each stage in the
order in which they are computed, and what comes after.
"""

import re
from collections import Counter
from typing import Any

from torch import nn

from spark_me.trace import Trace, blocks_of

BLOCKS = 3
"""Blocks of a group, but of ResNets."""
RESNET_BLOCKS, DEEP_RESNET_BLOCKS = (2, 3), (4, 4)
"""Of a ResNet's stages 2 and 3; and where stage 2 has `DEEP_RESNET` blocks or more."""
DEEP_RESNET = 8
SHALLOW_BLOCKS = 9
SHALLOW_CONVNEXT, DEEP_CONVNEXT = 6, 12
"""The group of a ConvNeXt's stage 4: with at most `SHALLOW_BLOCKS` blocks in stage 3, and with more."""

_RESNET = re.compile(r"layer(\d)\.(\d+)\.")
_TORCHVISION_CONVNEXT = re.compile(r"features\.(\d)(?:\.(\d+))?\.")
_TIMM_CONVNEXT = re.compile(r"stages\.(\d)\.(?:blocks\.(\d+)|downsample)\.")


class LayerDecay:
    """Shares of the learning rate, by parameter names of a dense network."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """
        Args:
            network: of `spark_me.dense.build_network`.
            decay: share from one group to the one before it.
        """
        self.decay = decay
        if decay == 1:
            self._groups: dict[str, int] = {}
            return
        names = [name for name, _ in network.named_parameters()]
        kind = {base.__name__ for base in type(network).__mro__}
        if "ResNet" in kind and any(_RESNET.match(name) for name in names):
            self._groups = _numbered(_resnet_places(names))
        elif "ConvNeXt" in kind:
            self._groups = _convnext_groups(names)
        else:
            traced: Any = network
            self._groups = _numbered(_places(names, traced.traced))

    def scale(self, name: str) -> float:
        """The share for a parameter."""
        if self.decay == 1:
            return 1.0
        return float(self.decay ** (self.last - self._groups[name]))

    @property
    def last(self) -> int:
        """The classifier's group."""
        return max(self._groups.values())


Places = dict[str, tuple[int, int]]
"""Name of a parameter → its stage, 0 for the stem, and the group in it."""


def _numbered(places: Places) -> dict[str, int]:
    """Places in their order, counted from 0."""
    order = {place: number for number, place in enumerate(sorted(set(places.values())))}
    return {name: order[place] for name, place in places.items()}


BEHIND = (1 << 30, 0)
"""The place of what comes behind the last map."""


def _resnet_places(names: list[str]) -> Places:
    found = {name: _RESNET.match(name) for name in names}
    depths = Counter({int(match[1]): int(match[2]) + 1 for match in found.values() if match})
    second, third = DEEP_RESNET_BLOCKS if depths[2] >= DEEP_RESNET else RESNET_BLOCKS
    size = {2: second, 3: third}
    places = {}
    for name, match in found.items():
        if match is None:
            places[name] = BEHIND if name.startswith("fc.") else (0, 0)
        else:
            stage, block = int(match[1]), int(match[2])
            places[name] = (stage, block // size[stage] if stage in size else 0)
    return places


def _convnext_groups(names: list[str]) -> dict[str, int]:
    places: dict[str, tuple[int, int] | None] = {}
    for name in names:
        if name.startswith(("stem.", "features.0.")):
            places[name] = (0, 0)
        elif match := _TORCHVISION_CONVNEXT.match(name):
            # Stages have the odd numbers; before each lies its downsampling.
            number = int(match[1])
            places[name] = (number // 2 + 1, int(match[2]) if number % 2 else 0)
        elif match := _TIMM_CONVNEXT.match(name):
            places[name] = (int(match[1]) + 1, int(match[2] or 0))
        else:
            places[name] = None
    deepest = max(block for stage, block in filter(None, places.values()) if stage == 3)
    last = DEEP_CONVNEXT if deepest >= SHALLOW_BLOCKS else SHALLOW_CONVNEXT

    def group(place: tuple[int, int] | None) -> int:
        if place is None:
            return last + 1
        stage, block = place
        return (0, 1, 2, 3 + block // BLOCKS, last)[stage]

    return {name: group(place) for name, place in places.items()}


def _places(names: list[str], traced: Trace) -> Places:
    """By the order of computation."""
    of_modules = {path: (stage, block // BLOCKS) for path, (stage, block) in blocks_of(traced).items()}
    places = {}
    for name in names:
        path = name
        while path and path not in of_modules:
            path = path.rpartition(".")[0]
        places[name] = of_modules.get(path, BEHIND)
    return places
