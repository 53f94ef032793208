"""Layer-wise decay of the learning rate: the deeper a layer, the closer to the classifier's full rate.

The groups are those of the published code. ResNets (SparK's own fine-tuning, the same in mmpretrain): the stem is
group 0, stage 1 is one group, stages 2 and 3 are groups of some consecutive blocks, stage 4 is one group, and the
classifier the last. ConvNeXts (the ConvNeXt paper's own fine-tuning, which SparK and mmpretrain follow): stem, stages 1
and 2, every three blocks of stage 3, stage 4, and what comes after; a downsampling layer belongs to the first group of
the stage behind it.
"""

import math
import re

from spark_me.encoders.registry import CONVNEXTS, RESNETS

# Blocks of stages 2 and 3 that make a group.
RESNET_BLOCKS = {"resnet152": (4, 4), "resnet200": (4, 4)}
OTHER_RESNET_BLOCKS = (2, 3)
CONVNEXT_BLOCKS = 3
# The group of a ConvNeXt's stage 4: of networks with at most 9 blocks in stage 3, and of deeper ones.
SHALLOW, DEEP = 6, 12

_RESNET = re.compile(r"layer(\d)\.(\d+)\.")
_TORCHVISION_CONVNEXT = re.compile(r"features\.(\d)(?:\.(\d+))?\.")
_TIMM_CONVNEXT = re.compile(r"stages\.(\d)\.(?:blocks\.(\d+)|downsample)\.")


class LayerDecay:
    """Shares of the learning rate, by parameter names of the dense networks of `get_model`."""

    def __init__(self, encoder: str, decay: float) -> None:
        """
        Args:
            encoder: name of a ResNet or ConvNeXt.
            decay: share from one group to the one before it.
        """
        self.encoder = encoder
        self.decay = decay

    def scale(self, name: str) -> float:
        """The share for a parameter."""
        return float(self.decay ** (self.last - self.group(name)))

    @property
    def last(self) -> int:
        """The classifier's group."""
        if self.encoder in CONVNEXTS:
            return self._convnext_stage_4 + 1
        second, third = self._resnet_groups
        return 3 + second + third

    def group(self, name: str) -> int:
        """The group of a parameter: 0 is the stem."""
        return self._convnext_group(name) if self.encoder in CONVNEXTS else self._resnet_group(name)

    @property
    def _resnet_blocks(self) -> tuple[int, int]:
        return RESNET_BLOCKS.get(self.encoder, OTHER_RESNET_BLOCKS)

    @property
    def _resnet_groups(self) -> tuple[int, int]:
        _, depths = RESNETS[self.encoder]
        second, third = self._resnet_blocks
        return math.ceil(depths[1] / second), math.ceil(depths[2] / third)

    def _resnet_group(self, name: str) -> int:
        match = _RESNET.match(name)
        if match is None:
            return self.last if name.startswith("fc.") else 0
        stage, block = int(match[1]), int(match[2])
        if stage == 4:
            return self.last - 1
        second, third = self._resnet_blocks
        return (1, 2 + block // second, 2 + self._resnet_groups[0] + block // third)[stage - 1]

    @property
    def _convnext_stage_4(self) -> int:
        _, depths, _ = CONVNEXTS[self.encoder]
        return DEEP if depths[2] > 9 else SHALLOW

    def _convnext_group(self, name: str) -> int:
        if name.startswith(("stem.", "features.0.")):
            return 0
        if match := _TORCHVISION_CONVNEXT.match(name):
            # Stages have the odd numbers; before each lies its downsampling.
            number = int(match[1])
            stage, block = number // 2 + 1, int(match[2]) if number % 2 else 0
        elif match := _TIMM_CONVNEXT.match(name):
            stage, block = int(match[1]) + 1, int(match[2] or 0)
        else:
            return self.last
        return (1, 2, 3 + block // CONVNEXT_BLOCKS, self._convnext_stage_4)[stage - 1]
