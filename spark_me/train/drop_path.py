"""Stochastic depth (arXiv 1603.09382) for the dense networks: a residual branch is left out for some images."""

import torch
from timm.layers import DropPath
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import stochastic_depth

BLOCKS = (BasicBlock, Bottleneck, CNBlock, ConvNeXtBlock)


def set_drop_path(network: nn.Module, rate: float) -> None:
    """Drop branches in training, with a probability that grows linearly from 0 at the first block to `rate`.

    Norms must not be replaced afterwards.
    """
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    for block, probability in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist()):
        if isinstance(block, CNBlock):
            block.stochastic_depth.p = probability
        elif isinstance(block, ConvNeXtBlock):
            block.drop_path = DropPath(probability)
        else:
            _drop_after(block.bn3 if isinstance(block, Bottleneck) else block.bn2, probability)


def _drop_after(norm: nn.Module, probability: float) -> None:
    """Drop what torchvision's ResNet blocks, which know no stochastic depth, add to the shortcut."""

    def drop(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        dropped: Tensor = stochastic_depth(output, probability, "row", module.training)
        return dropped

    norm.register_forward_hook(drop)
