"""torchvision's networks for use downstream, with `extract_feat` and an optional classifier. Needs torchvision."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torchvision.models import convnext, resnet

from spark_me.encoders.registry import CONVNEXTS, RESNETS

Maps = tuple[Tensor, Tensor, Tensor, Tensor]


class Features(ABC):
    """What dense networks of all kinds have in common downstream."""

    num_classes: Any  # int, 0 or None for none: torchvision's, timm's and ours declare it each in their way

    @abstractmethod
    def feature_maps(self, images: Tensor) -> Maps:
        """Images [B, C, H, W], normalised as in training → maps [B, C_i, H/s_i, W/s_i] at strides 4, 8, 16, 32."""

    @abstractmethod
    def pool(self, deepest: Tensor) -> Tensor:
        """The deepest map, averaged, and normalised where the classifier begins with a norm: [B, C_4]."""

    def extract_feat(self, images: Tensor) -> tuple[Tensor, ...]:
        """What mmpretrain's models return by this name: the maps of `feature_maps`; of a classifier, its input alone.

        Args:
            images: [B, C, H, W], normalised as in training.

        Returns:
            Four maps [B, C_i, H/s_i, W/s_i]; one tensor [B, C_4] in a tuple where there is a classifier.
        """
        maps = self.feature_maps(images)
        return (self.pool(maps[-1]),) if self.num_classes else maps


class DenseResNet(Features, resnet.ResNet):
    """torchvision's ResNet of a name in `list_encoders()`, with its parameter names; the classifier is optional."""

    def __init__(self, encoder: str, num_classes: int | None = None, in_channels: int = 3) -> None:
        block, depths = RESNETS[encoder]
        super().__init__(getattr(resnet, block), list(depths), num_classes or 1)
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        if num_classes is None:
            del self.fc
        self.num_classes = num_classes

    def feature_maps(self, images: Tensor) -> Maps:
        """The outputs of the four stages."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        first = self.layer1(x)
        second = self.layer2(first)
        third = self.layer3(second)
        return first, second, third, self.layer4(third)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]; without a classifier the deepest features, averaged: [B, C_4]."""
        pooled = self.pool(self.feature_maps(images)[-1])
        return pooled if self.num_classes is None else self.fc(pooled)

    def pool(self, deepest: Tensor) -> Tensor:
        """The deepest map, averaged."""
        return self.avgpool(deepest).flatten(1)


class DenseConvNeXt(Features, convnext.ConvNeXt):
    """torchvision's ConvNeXt (V1), with its parameter names; classifier and norm before it are optional."""

    def __init__(self, encoder: str, num_classes: int | None = None, in_channels: int = 3) -> None:
        _, depths, widths = CONVNEXTS[encoder]
        stages = [
            convnext.CNBlockConfig(width, following, depth)
            for width, following, depth in zip(widths, (*widths[1:], None), depths)
        ]
        super().__init__(stages, num_classes=num_classes or 1)
        if in_channels != 3:
            self.features[0][0] = nn.Conv2d(in_channels, widths[0], 4, stride=4)
        if num_classes is None:
            self.classifier = nn.Flatten()
        self.num_classes = num_classes

    def feature_maps(self, images: Tensor) -> Maps:
        """The outputs of the four stages."""
        # Downsampling (first the stem) and stages take turns.
        first = self.features[:2](images)
        second = self.features[2:4](first)
        third = self.features[4:6](second)
        return first, second, third, self.features[6:](third)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]; without a classifier the deepest features, averaged: [B, C_4]."""
        return self.classifier(self.avgpool(self.feature_maps(images)[-1]))

    def pool(self, deepest: Tensor) -> Tensor:
        """The deepest map, averaged; normalised where there is a classifier."""
        classifier: Any = self.classifier
        pooled: Tensor = self.avgpool(deepest)
        return classifier(pooled) if self.num_classes is None else classifier[:-1](pooled)
