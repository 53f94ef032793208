"""timm's networks that torchvision lacks, for use downstream. Needs timm."""

from timm.models import convnext
from torch import Tensor

from spark_me.encoders.registry import CONVNEXTS
from spark_me.weights.convnext_tables import TIMM_CONV_MLP
from spark_me.weights.dense import Features, Maps


class DenseConvNeXtV2(Features, convnext.ConvNeXt):
    """timm's ConvNeXt V2, with its parameter names; classifier and norm before it are optional."""

    def __init__(self, encoder: str, num_classes: int | None = None, in_channels: int = 3) -> None:
        _, depths, widths = CONVNEXTS[encoder]
        super().__init__(
            in_channels,
            num_classes or 0,
            depths=depths,
            dims=widths,
            use_grn=True,
            ls_init_value=None,
            conv_mlp=encoder in TIMM_CONV_MLP,
        )
        if num_classes is None:
            del self.head

    def feature_maps(self, images: Tensor) -> Maps:
        """The outputs of the four stages."""
        first = self.stages[0](self.stem(images))
        second = self.stages[1](first)
        third = self.stages[2](second)
        return first, second, third, self.stages[3](third)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]; without a classifier the deepest features, averaged: [B, C_4]."""
        deepest = self.feature_maps(images)[-1]
        return self.head(deepest) if self.num_classes else self.pool(deepest)

    def pool(self, deepest: Tensor) -> Tensor:
        """The deepest map, averaged; normalised where there is a classifier."""
        return self.head(deepest, pre_logits=True) if self.num_classes else deepest.mean((2, 3))
