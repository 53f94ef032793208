"""Sparse ResNets: torchvision's architecture and names, on visible sites only."""

from collections.abc import Iterator

import torch
from torch import nn

from spark_me import sparse
from spark_me.encoders.base import SparseEncoder
from spark_me.encoders.checkpointing import checkpointed
from spark_me.sparse import SparseTensor


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = sparse.Conv2d(in_channels, width, 3, stride)
        self.bn1 = sparse.BatchNorm(width)
        self.conv2 = sparse.Conv2d(width, width, 3)
        self.bn2 = sparse.BatchNorm(width)
        self.drop_path = sparse.DropPath(drop_path)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: SparseTensor) -> SparseTensor:
        residual = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(residual), self.downsample(x), self.drop_path, relu=True)

    @property
    def last_norm(self) -> sparse.BatchNorm:
        """That of the residual branch: from a weight of zero, the block starts as its shortcut."""
        return self.bn2


class Bottleneck(nn.Module):
    """1×1, 3×3 (strided), 1×1 convolutions and a shortcut (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = sparse.Conv2d(in_channels, width, 1)
        self.bn1 = sparse.BatchNorm(width)
        self.conv2 = sparse.Conv2d(width, width, 3, stride)
        self.bn2 = sparse.BatchNorm(width)
        self.conv3 = sparse.Conv2d(width, out_channels, 1)
        self.bn3 = sparse.BatchNorm(out_channels)
        self.drop_path = sparse.DropPath(drop_path)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: SparseTensor) -> SparseTensor:
        residual = self.bn1(self.conv1(x), relu=True)
        residual = self.bn2(self.conv2(residual), relu=True)
        return self.bn3(self.conv3(residual), self.downsample(x), self.drop_path, relu=True)

    @property
    def last_norm(self) -> sparse.BatchNorm:
        """That of the residual branch: from a weight of zero, the block starts as its shortcut."""
        return self.bn3


class ResNet(SparseEncoder):
    """A ResNet without its classifier; names are torchvision's, with `kernel` for a convolution's `weight`."""

    strides = (4, 8, 16, 32)
    total_stride = 32

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        in_channels: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        """
        Args:
            block: BasicBlock or Bottleneck.
            depths: number of blocks in each of the four stages.
            in_channels: channels of the images.
            drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        """
        super().__init__()
        self.channels = tuple(width * block.expansion for width in (64, 128, 256, 512))
        self.conv1 = sparse.Conv2d(in_channels, 64, 7, stride=2)
        self.bn1 = sparse.BatchNorm(64)
        self.maxpool = sparse.MaxPool2d(3, stride=2)
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.layer1 = _stage(block, 64, 64, depths[0], 1, rates)
        self.layer2 = _stage(block, self.channels[0], 128, depths[1], 2, rates)
        self.layer3 = _stage(block, self.channels[1], 256, depths[2], 2, rates)
        self.layer4 = _stage(block, self.channels[2], 512, depths[3], 2, rates)
        self._initialise()

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """Features at strides 4, 8, 16 and 32 of a sparse image at stride 1."""
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = checkpointed(block, x) if self.checkpointing and self.training else block(x)
            features.append(x)
        return features

    def start_residuals(self, weight: float) -> bool:
        """Start the last norm of every block at this weight: 0 as timm does, 1 as torchvision."""
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.constant_(module.last_norm.weight, weight)
        return True

    def _initialise(self) -> None:
        """He initialisation by fan-out, as torchvision; the last norm of every block starts at zero, as timm."""
        for module in self.modules():
            if isinstance(module, sparse.Conv2d):
                fan_out = module.kernel_size**2 * module.out_channels
                nn.init.normal_(module.kernel, std=(2 / fan_out) ** 0.5)
        self.start_residuals(0.0)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(sparse.Conv2d(in_channels, out_channels, 1, stride), sparse.BatchNorm(out_channels))


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    width: int,
    depth: int,
    stride: int,
    drop_path_rates: Iterator[float],
) -> nn.Sequential:
    blocks = [block(in_channels, width, stride, next(drop_path_rates))]
    blocks += [block(width * block.expansion, width, 1, next(drop_path_rates)) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)
