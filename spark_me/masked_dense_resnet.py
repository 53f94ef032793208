"""The dense simulation of sparse ResNets, on torchvision's modules: a mask after every layer."""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from spark_me.encoders.registry import RESNETS
from spark_me.masked_dense_layers import drop_images, mask_out, masked_batch_norm


class MaskedDenseResNet(nn.Module):
    """A torchvision ResNet, computed as if hidden patches did not exist. Parameter names are torchvision's."""

    densify_norm = nn.BatchNorm2d

    def __init__(self, name: str, in_channels: int = 3, drop_path: float = 0.0) -> None:
        super().__init__()
        block, depths = RESNETS[name]  # torchvision has no ResNet-200 by name
        network = torchvision.models.ResNet(getattr(torchvision.models.resnet, block), list(depths))
        if in_channels != 3:
            network.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.conv1, self.bn1, self.maxpool = network.conv1, network.bn1, network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        self.channels = tuple(stage[-1].bn1.num_features * stage[-1].expansion for stage in self._stages())
        blocks = [block for stage in self._stages() for block in stage]
        self._drop_path = dict(zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist()))

    def forward(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """Images [B, C, H, W] and visible bool [B, fh, fw] → four maps [B, C_i, H/s_i, W/s_i], zero where hidden."""
        x = mask_out(images, visible)
        x = masked_batch_norm(self.bn1, self.conv1(x), visible).relu()
        # After ReLU a hidden zero never wins against a visible value, so plain max-pooling is exact.
        x = mask_out(self.maxpool(x), visible)
        features = []
        for stage in self._stages():
            for block in stage:
                x = self._block(block, x, visible)
            features.append(x)
        return features

    def dense_name(self, name: str) -> str:
        """This module's name of a sparse ResNet's tensor; a convolution's is still called `kernel`."""
        return name

    def _stages(self) -> tuple[Any, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def _block(self, block: Any, x: Tensor, visible: Tensor) -> Tensor:
        residual = masked_batch_norm(block.bn1, block.conv1(x), visible).relu()
        residual = masked_batch_norm(block.bn2, block.conv2(residual), visible)
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            residual = masked_batch_norm(block.bn3, block.conv3(residual.relu()), visible)
        rate = self._drop_path[block]
        if self.training and rate:
            residual = drop_images(residual, rate)
        shortcut = x
        if block.downsample is not None:
            conv, norm = block.downsample
            shortcut = masked_batch_norm(norm, conv(x), visible)
        return (residual + shortcut).relu()
