"""timm's networks that torchvision lacks, for use downstream. Needs timm."""

from timm.models import convnext
from torch import Tensor

from spark_me.encoders.registry import CONVNEXTS
from spark_me.weights.convnext_tables import TIMM_CONV_MLP


class DenseConvNeXtV2(convnext.ConvNeXt):
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

    def extract_feat(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [B, C, H, W], normalised as in training → the stages' outputs at strides 4, 8, 16, 32."""
        first = self.stages[0](self.stem(images))
        second = self.stages[1](first)
        third = self.stages[2](second)
        return first, second, third, self.stages[3](third)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]; without a classifier the deepest features, averaged: [B, C_4]."""
        deepest = self.extract_feat(images)[-1]
        return self.head(deepest) if self.num_classes else deepest.mean((2, 3))
