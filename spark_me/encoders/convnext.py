"""Sparse ConvNeXt V1 (arXiv 2201.03545) and V2 (arXiv 2301.00808), on visible sites only."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from spark_me import sparse
from spark_me.encoders.base import SparseEncoder
from spark_me.encoders.checkpointing import checkpointed
from spark_me.sparse import SparseTensor

LAYER_SCALE = 1e-6
"""What V1's residual branches are first scaled by."""


class Block(nn.Module):
    """Depthwise 7×7 convolution, norm, two linear layers with GELU between, and a shortcut.

    V1 scales the residual branch by a learned `gamma`; V2 has a global response norm between the linear layers instead.
    """

    def __init__(self, version: int, channels: int, drop_path: float) -> None:
        super().__init__()
        self.dwconv = sparse.DepthwiseConv2d(channels, 7)
        self.norm = sparse.LayerNorm(channels)
        self.pwconv1 = sparse.Linear(channels, 4 * channels)
        self.act = sparse.GELU()
        self.grn = sparse.GlobalResponseNorm(4 * channels) if version == 2 else None
        self.pwconv2 = sparse.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), LAYER_SCALE)) if version == 1 else None
        self.drop_path = sparse.DropPath(drop_path)

    def forward(self, x: SparseTensor) -> SparseTensor:
        residual = self.pwconv1(self.norm(self.dwconv(x)))
        residual = self.pwconv2(self.act(residual) if self.grn is None else self.grn(residual, gelu=True))
        if self.gamma is not None:
            residual = sparse.with_features(residual, residual.F * self.gamma)
        return sparse.add(self.drop_path(residual), x)


class ConvNeXt(SparseEncoder):
    """A ConvNeXt without its last norm and classifier.

    Parameter names are the original implementation's, with `kernel` for a convolution's `weight`.
    """

    strides = (4, 8, 16, 32)
    total_stride = 32
    densify_norm = sparse.LayerNorm

    def __init__(
        self,
        version: int,
        depths: Sequence[int],
        widths: Sequence[int],
        in_channels: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        """
        Args:
            version: 1 or 2.
            depths: number of blocks in each of the four stages.
            widths: channels in each of the four stages.
            in_channels: channels of the images.
            drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        """
        super().__init__()
        self.channels = tuple(widths)
        stem = nn.Sequential(sparse.Conv2d(in_channels, widths[0], 4, stride=4, bias=True), sparse.LayerNorm(widths[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for wide, wider in zip(widths, widths[1:]):
            norm, convolution = sparse.LayerNorm(wide), sparse.Conv2d(wide, wider, 2, stride=2, bias=True)
            self.downsample_layers.append(nn.Sequential(norm, convolution))
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(_stage(version, *stage, rates) for stage in zip(widths, depths))
        self._initialise()

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """Features at strides 4, 8, 16 and 32 of a sparse image at stride 1."""
        features = []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = downsample(x)
            for block in stage.children():
                x = checkpointed(block, x) if self.checkpointing and self.training else block(x)
            features.append(x)
        return features

    def _initialise(self) -> None:
        """Truncated normal (std 0.02) for weights, zero for biases, as published."""
        for module in self.modules():
            if isinstance(module, sparse.Conv2d | sparse.DepthwiseConv2d):
                nn.init.trunc_normal_(module.kernel, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, sparse.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


def _stage(version: int, channels: int, depth: int, drop_path_rates: Iterator[float]) -> nn.Sequential:
    return nn.Sequential(*(Block(version, channels, next(drop_path_rates)) for _ in range(depth)))
