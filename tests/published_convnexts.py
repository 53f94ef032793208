"""ConvNeXt V1 and V2 as masked-dense modules: their state dicts have the published names.

Written from the papers' description and the published key lists alone; nothing is shared with `spark_me.weights`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

# Version, number of blocks and channels in each of the four stages, from the papers (2201.03545, 2301.00808).
CONVNEXTS = {
    "convnext_tiny": (1, (3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": (1, (3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": (1, (3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": (1, (3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnextv2_atto": (2, (2, 2, 6, 2), (40, 80, 160, 320)),
    "convnextv2_femto": (2, (2, 2, 6, 2), (48, 96, 192, 384)),
    "convnextv2_pico": (2, (2, 2, 6, 2), (64, 128, 256, 512)),
    "convnextv2_nano": (2, (2, 2, 8, 2), (80, 160, 320, 640)),
    "convnextv2_tiny": (2, (3, 3, 9, 3), (96, 192, 384, 768)),
    "convnextv2_base": (2, (3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnextv2_large": (2, (3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnextv2_huge": (2, (3, 3, 27, 3), (352, 704, 1408, 2816)),
}
# depthwise convolution and the two linear layers of a block
NAMES = {
    "official": ("dwconv", "pwconv1", "pwconv2"),
    "mmpretrain": ("depthwise_conv", "pointwise_conv1", "pointwise_conv2"),
}


class PublishedConvNeXt(nn.Module):
    """Maps at strides 4, 8, 16, 32, computed as if hidden patches did not exist.

    `names` is "official" (ConvNeXt's and SparK's code; GRN as in ConvNeXt-V2's: [1, 1, 1, 4C]) or "mmpretrain".
    """

    def __init__(self, encoder: str, names: str) -> None:
        super().__init__()
        version, depths, self.channels = CONVNEXTS[encoder]
        widths = self.channels
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), _layer_norm(widths[0]))])
        for a, b in zip(widths, widths[1:]):
            self.downsample_layers.append(nn.Sequential(_layer_norm(a), nn.Conv2d(a, b, 2, 2)))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(width, version, names) for _ in range(depth)) for width, depth in zip(widths, depths)
        )

    def forward(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        # one row of sites after another: [B, h, w, C], hidden ones zero
        x, maps = images.permute(0, 2, 3, 1) * _mask(images.permute(0, 2, 3, 1), visible), []
        for (first, second), stage in zip(self.downsample_layers, self.stages):
            x = _rows(first, x)
            x = _rows(second, x * _mask(x, visible))
            x = x * _mask(x, visible)
            for block in stage:
                x = x + block(x, _mask(x, visible))
            maps.append(x.permute(0, 3, 1, 2))
        return maps


class Block(nn.Module):
    def __init__(self, width: int, version: int, names: str) -> None:
        super().__init__()
        self.names, self.version = NAMES[names], version
        layers = (
            nn.Conv2d(width, width, 7, 1, 3, groups=width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        for name, layer in zip(self.names, layers):
            self.add_module(name, layer)
        self.norm = _layer_norm(width)
        if version == 1:
            self.gamma = nn.Parameter(torch.zeros(width))
        else:
            self.grn = nn.Module()
            shape = (1, 1, 1, 4 * width) if names == "official" else (4 * width,)
            self.grn.gamma, self.grn.beta = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        depthwise, expand, reduce = (getattr(self, name) for name in self.names)
        x = functional.gelu(expand(self.norm(_rows(depthwise, x)))) * mask
        if self.version == 2:  # the response of an image is over its own visible sites
            response = x.square().sum((1, 2), keepdim=True).sqrt()
            x = x + self.grn.gamma * (x * (response / (response.mean(-1, keepdim=True) + 1e-6))) + self.grn.beta
        x = reduce(x)
        return (x if self.version == 2 else x * self.gamma) * mask


def _layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer on [B, h, w, C]."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else layer(x)


def _mask(x: Tensor, visible: Tensor) -> Tensor:
    """`visible` [B, fh, fw] at the sites of x [B, h, w, C]: [B, h, w, 1]."""
    scale = x.shape[1] // visible.shape[1]
    return visible.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[..., None].to(x.dtype)
