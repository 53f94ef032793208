"""The published pretraining models as masked-dense modules: their state dicts have the published names.

Written from the papers' description and the published key lists alone, so that loading a checkpoint here (strict, by
torch itself) shares nothing with `spark_me.weights`.
"""

from functools import partial

import torch
from published_convnexts import Block, PublishedConvNeXt
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet

from spark_me.masked_dense import MaskedDense

RESNETS = {
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnet200": (3, 24, 36, 3),
}
"""Bottleneck blocks in each of the four stages."""


def _widths(width: int) -> list[int]:
    return [width, width // 2, width // 4, width // 8, width // 16, width // 32]


def _projections(channels: list[int], width: int) -> nn.ModuleList:
    sizes = zip(channels, _widths(width), (1, 3, 3, 3))
    return nn.ModuleList(nn.Conv2d(a, b, kernel, padding=kernel // 2) for a, b, kernel in sizes)


def _encoder(name: str, names: str) -> nn.Module:
    if name not in RESNETS:
        return PublishedConvNeXt(name, names)
    network = resnet.ResNet(resnet.Bottleneck, list(RESNETS[name]))
    network.fc = nn.Identity()
    return network


def _channels(encoder: nn.Module) -> list[int]:
    """Of the maps, deep to shallow."""
    return [2048, 1024, 512, 256] if isinstance(encoder, resnet.ResNet) else list(encoder.channels[::-1])


def _maps(encoder: nn.Module, images: Tensor, visible: Tensor) -> list[Tensor]:
    """Deep to shallow, as if hidden patches did not exist."""
    if isinstance(encoder, resnet.ResNet):
        encoder = MaskedDense(encoder, [(f"layer{stage}", 2 ** (stage + 1)) for stage in (1, 2, 3, 4)])
    return encoder(images, visible)[::-1]


def _norms(name: str, channels: list[int]) -> nn.ModuleList:
    kind = nn.BatchNorm2d if name in RESNETS else partial(nn.LayerNorm, eps=1e-6)
    return nn.ModuleList(kind(c) for c in channels)


class _OfficialBlock(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(a, a, 4, 2, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(a, a, 3, 1, 1, bias=False),
            nn.BatchNorm2d(a),
            nn.ReLU6(),
            nn.Conv2d(a, b, 3, 1, 1, bias=False),
            nn.BatchNorm2d(b),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up_sample(x))


class OfficialSparK(nn.Module):
    def __init__(self, encoder: str, width: int) -> None:
        super().__init__()
        for name, shape in (("imn_m", (1, 3, 1, 1)), ("imn_s", (1, 3, 1, 1)), ("norm_black", (1, 3, 224, 224))):
            self.register_buffer(name, torch.zeros(shape))
        self.sparse_encoder = nn.Module()
        self.sparse_encoder.sp_cnn = _encoder(encoder, "official")
        self.dense_decoder = nn.Module()
        widths = _widths(width)
        self.dense_decoder.dec = nn.ModuleList(_OfficialBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.dense_decoder.proj = nn.Conv2d(widths[-1], 3, 1)
        channels = _channels(self.sparse_encoder.sp_cnn)
        self.densify_norms = _norms(encoder, channels)
        self.densify_projs = _projections(channels, width)
        if channels[0] == width:  # equal widths are not projected at the deepest scale
            self.densify_projs[0] = nn.Identity()
        self.mask_tokens = nn.ParameterList(torch.zeros(1, c, 1, 1) for c in channels)

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        maps = _maps(self.sparse_encoder.sp_cnn, images, visible)
        dense = _densify(maps, visible, self.densify_norms, self.mask_tokens, self.densify_projs)
        return self.dense_decoder.proj(_decode(dense, self.dense_decoder.dec))


class _MmpretrainBlock(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(a, a, 4, 2, 1)
        self.conv_blocks = nn.ModuleList([nn.Module()])
        self.conv_blocks[0].conv1, self.conv_blocks[0].norm1 = nn.Conv2d(a, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a)
        self.conv_blocks[0].conv2, self.conv_blocks[0].norm2 = nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)

    def forward(self, x: Tensor) -> Tensor:
        block = self.conv_blocks[0]
        return block.norm2(block.conv2(functional.relu6(block.norm1(block.conv1(self.upsample(x))))))


class MmpretrainSparK(nn.Module):
    def __init__(self, encoder: str, width: int) -> None:
        super().__init__()
        self.backbone = _encoder(encoder, "mmpretrain")
        self.neck = nn.Module()
        widths = _widths(width)
        self.neck.decoder = nn.ModuleList(_MmpretrainBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.neck.proj = nn.Conv2d(widths[-1], 3, 1)
        channels = _channels(self.backbone)
        self.enc_dec_norms = _norms(encoder, channels)
        self.enc_dec_projectors = _projections(channels, width)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, c, 1, 1) for c in channels)

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        maps = _maps(self.backbone, images, visible)
        dense = _densify(maps, visible, self.enc_dec_norms, self.mask_tokens, self.enc_dec_projectors)
        return self.neck.proj(_decode(dense, self.neck.decoder))


class FCMAEDecoder(nn.Module):
    """What ConvNeXt V2's pretraining has beside its encoder, under the names of its state dict."""

    def __init__(self, channels: int, width: int = 512, depth: int = 1, patch: int = 32) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.ModuleList(Block(width, 2, "official") for _ in range(depth))
        self.pred = nn.Conv2d(width, patch * patch * 3, 1)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """The encoder's last map [B, C, fh, fw] → patches [B, fh·fw, P·P·3]: rows, columns, channels."""
        mask = visible[:, None].to(x.dtype)
        x = (self.proj(x) * mask + self.mask_token * (1 - mask)).permute(0, 2, 3, 1)
        for block in self.decoder:
            x = x + block(x, torch.ones_like(x[..., :1]))
        return self.pred(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)


def fcmae_loss(prediction: Tensor, images: Tensor, visible: Tensor, patch: int = 32) -> Tensor:
    """With pixels normalised by patch, as FCMAE is trained."""
    batch, channels, height, width = images.shape
    blocks = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    targets = torch.einsum("bchpwq->bhwpqc", blocks).reshape(batch, -1, patch * patch * channels)
    mean, variance = targets.mean(-1, keepdim=True), targets.var(-1, keepdim=True)
    errors = (prediction - (targets - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
    hidden = (~visible).flatten(1).to(errors.dtype)
    return (errors * hidden).sum() / hidden.sum()


def reconstruct(model: nn.Module, images: Tensor, visible: Tensor, patch: int = 32) -> Tensor:
    """The prediction in the units of the images, each patch scaled back by its own mean and unbiased deviation."""
    targets = functional.unfold(images, patch, stride=patch)
    deviation = (targets.var(dim=1, keepdim=True) + 1e-6).sqrt()
    predictions = functional.unfold(model(images, visible), patch, stride=patch)
    return functional.fold(
        predictions * deviation + targets.mean(1, keepdim=True), images.shape[2:], patch, stride=patch
    )


def _densify(
    maps: list[Tensor], visible: Tensor, norms: nn.ModuleList, tokens: nn.ParameterList, projections: nn.ModuleList
) -> list[Tensor]:
    return [
        projection(torch.where(_mask(x, visible), _evaluated(norm, x), token))
        for x, norm, token, projection in zip(maps, norms, tokens, projections, strict=True)
    ]


def _mask(x: Tensor, visible: Tensor) -> Tensor:
    """`visible` [B, fh, fw] at the positions of x [B, C, h, w]: [B, 1, h, w]."""
    scale = x.shape[2] // visible.shape[1]
    return visible.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None]


def _evaluated(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm in evaluation mode, which sees each position by itself."""
    assert not norm.training
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if isinstance(norm, nn.LayerNorm) else norm(x)


def _decode(maps: list[Tensor], blocks: nn.ModuleList) -> Tensor:
    x = maps[0]
    for level, block in enumerate(blocks):
        x = block(x + maps[level] if 0 < level < len(maps) else x)
    return x
