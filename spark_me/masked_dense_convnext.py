"""The dense simulation of sparse ConvNeXts, on torchvision's (V1) and timm's (V2) modules.

Hidden sites are zeroed where one site reads another: before every depthwise convolution, in the statistics of global
response norm, and in what is returned. Strided convolutions do not overlap, so their windows never leave a patch, and
everything else computes each site by itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.models import convnext as timm_convnext
from torch import Tensor, nn
from torchvision.models import convnext as torchvision_convnext

from spark_me.encoders.registry import CONVNEXTS
from spark_me.masked_dense_layers import drop_images, mask_like


def masked_dense_convnext(name: str, in_channels: int = 3, drop_path: float = 0.0) -> "MaskedDenseConvNeXt":
    """The simulation of a ConvNeXt of the registry."""
    version, _, _ = CONVNEXTS[name]
    return (MaskedDenseConvNeXtV1 if version == 1 else MaskedDenseConvNeXtV2)(name, in_channels, drop_path)


class MaskedDenseConvNeXt(nn.Module):
    """A ConvNeXt, computed as if hidden patches did not exist."""

    def __init__(self, name: str, drop_path: float) -> None:
        super().__init__()
        _, depths, self.channels = CONVNEXTS[name]
        self._rates = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()

    def forward(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """Images [B, C, H, W] and visible bool [B, fh, fw] → four maps [B, C_i, H/s_i, W/s_i], zero where hidden."""
        x = images
        features = []
        rates = iter(self._rates)
        for downsample, blocks in self.stages_of():
            x = downsample(x)
            mask = mask_like(x, visible).to(x.dtype)
            for block in blocks.children():
                x = x * mask
                residual, rate = self._residual(block, x, mask), next(rates)
                x = x + (drop_images(residual, rate) if self.training and rate else residual)
            features.append(x * mask)
        return features

    def dense_name(self, name: str) -> str:
        """This module's name of a sparse ConvNeXt's tensor; a convolution's is still called `kernel`."""
        raise NotImplementedError

    def stages_of(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """What downsamples, first the stem, and the blocks after it, four times."""
        raise NotImplementedError

    def densify_norm(self, channels: int) -> nn.Module:
        """The norm that densifying applies."""
        return torchvision_convnext.LayerNorm2d(channels, eps=1e-6)

    def _residual(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        """The residual branch of a block, whatever it is at hidden sites."""
        raise NotImplementedError


class MaskedDenseConvNeXtV1(MaskedDenseConvNeXt):
    """On torchvision's ConvNeXt; parameter names are torchvision's."""

    LAYERS = {"dwconv": "block.0", "norm": "block.2", "pwconv1": "block.3", "pwconv2": "block.5"}

    def __init__(self, name: str, in_channels: int = 3, drop_path: float = 0.0) -> None:
        super().__init__(name, drop_path)
        _, depths, widths = CONVNEXTS[name]
        followers = (*widths[1:], None)
        stages = [torchvision_convnext.CNBlockConfig(*stage) for stage in zip(widths, followers, depths)]
        self.features: Any = torchvision_convnext.ConvNeXt(stages).features
        if in_channels != 3:
            self.features[0][0] = nn.Conv2d(in_channels, widths[0], 4, stride=4)

    def dense_name(self, name: str) -> str:
        kind, stage, *rest = name.split(".")
        if kind == "downsample_layers":
            return ".".join(["features", str(2 * int(stage)), *rest])
        block, layer, *leaf = rest
        of_block = [self.LAYERS[layer], *leaf] if leaf else ["layer_scale"]
        return ".".join(["features", str(2 * int(stage) + 1), block, *of_block])

    def stages_of(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        return zip(self.features[::2], self.features[1::2])

    def _residual(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        return block.layer_scale * block.block(x)


class MaskedDenseConvNeXtV2(MaskedDenseConvNeXt):
    """On timm's ConvNeXt; parameter names are timm's, with linear layers in every size of network."""

    LAYERS = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    GRN = {"gamma": "mlp.grn.weight", "beta": "mlp.grn.bias"}

    def __init__(self, name: str, in_channels: int = 3, drop_path: float = 0.0) -> None:
        super().__init__(name, drop_path)
        _, depths, widths = CONVNEXTS[name]
        network: Any = timm_convnext.ConvNeXt(
            in_channels, num_classes=0, depths=depths, dims=widths, use_grn=True, ls_init_value=None
        )
        self.stem, self.stages = network.stem, network.stages

    def dense_name(self, name: str) -> str:
        kind, stage, *rest = name.split(".")
        if kind == "downsample_layers":
            return ".".join(["stem", *rest] if stage == "0" else ["stages", stage, "downsample", *rest])
        block, layer, leaf = rest
        of_block = self.GRN[leaf] if layer == "grn" else f"{self.LAYERS[layer]}.{leaf}"
        return f"stages.{stage}.blocks.{block}.{of_block}"

    def stages_of(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        downsamples = [self.stem, *(stage.downsample for stage in self.stages[1:])]
        return zip(downsamples, (stage.blocks for stage in self.stages))

    def _residual(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = block.norm(block.conv_dw(x).permute(0, 2, 3, 1))
        x = block.mlp.act(block.mlp.fc1(x))
        x = block.mlp.fc2(_masked_response_norm(block.mlp.grn, x, mask))
        return x.permute(0, 3, 1, 2)


def _masked_response_norm(grn: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Global response norm of x [B, h, w, C] by the visible sites of each image; mask [B, 1, h, w]."""
    norm = torch.linalg.vector_norm(x * mask[:, 0, :, :, None], dim=(1, 2), keepdim=True)
    response = norm / (norm.mean(dim=-1, keepdim=True) + grn.eps)
    return torch.addcmul(grn.bias.to(x.dtype), x, (1 + grn.weight * response).to(x.dtype))
