"""SparK by simulation: dense networks with an explicit mask.

This is how other implementations compute it, at full dense cost. Here it is the oracle of the tests and the baseline of
the benchmark; it shares the decoder's parameters with `spark_me.spark` and no computation with it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spark_me.decoder import Decoder
from spark_me.encoders.registry import CONVNEXTS, RESNETS
from spark_me.masked_dense_convnext import masked_dense_convnext
from spark_me.masked_dense_layers import mask_like, masked_batch_norm
from spark_me.masked_dense_resnet import MaskedDenseResNet
from spark_me.weights.kernels import to_dense_state

FAMILIES: Sequence[tuple[Mapping[str, Any], Callable[[str, int, float], nn.Module]]] = (
    (RESNETS, MaskedDenseResNet),
    (CONVNEXTS, masked_dense_convnext),
)
"""Encoders of a family, and (name, in_channels, drop_path) → its simulation."""


def masked_dense_encoder(name: str, in_channels: int = 3, drop_path: float = 0.0) -> Any:
    """The simulation of an encoder of `FAMILIES`: (images, visible) → four maps, zero where hidden."""
    (build,) = (build for family, build in FAMILIES if name in family)
    return build(name, in_channels, drop_path)


class MaskedDenseSparK(nn.Module):
    """The whole method on the simulation; parameters are named as in `spark_me.spark.SparK`, with dense weights."""

    def __init__(
        self, name: str, in_channels: int = 3, decoder_width: int = 512, patch_size: int = 32, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.encoder = masked_dense_encoder(name, in_channels, drop_path)
        self.decoder = Decoder(decoder_width, patch_size, in_channels)
        self.densify = nn.ModuleList(
            MaskedDensify(width_in, width_out, 3 if level else 1, self.encoder.densify_norm)
            for level, (width_in, width_out) in enumerate(zip(self.encoder.channels[::-1], self.decoder.widths))
        )

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """The pretraining loss of images [B, C, H, W] with visible bool [B, fh, fw]."""
        prediction = self.predict(images, visible)
        size = self.patch_size
        # unfold orders a patch as [C, P, P]; the mean over a patch does not depend on the order
        targets = functional.unfold(images, size, stride=size)
        predictions = functional.unfold(prediction, size, stride=size)
        mean = targets.mean(dim=1, keepdim=True)
        variance = (targets - mean).square().sum(dim=1, keepdim=True) / (targets.shape[1] - 1)
        errors = (predictions - (targets - mean) / torch.sqrt(variance + 1e-6)).square().mean(dim=1)
        hidden = ~visible.flatten(1)
        return (errors * hidden).sum() / hidden.sum()

    def predict(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normalised pixels [B, C, H, W]."""
        features = self.encoder(images, visible)
        return plain_decode(self.decoder, [f(x, visible) for f, x in zip(self.densify, reversed(features))])

    def load_sparse(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a `SparK` model's state dict."""
        self.load_state_dict(self.from_sparse(state))

    def from_sparse(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors named and shaped as in a `SparK` model (weights, or their gradients), as they are here."""
        renamed = {
            f"encoder.{self.encoder.dense_name(key.removeprefix('encoder.'))}" if key.startswith("encoder.") else key: x
            for key, x in state.items()
        }
        converted = to_dense_state(renamed, self)
        layer_scales = {key: x[:, None, None] for key, x in converted.items() if key.endswith("layer_scale")}
        return converted | layer_scales


class MaskedDensify(nn.Module):
    """Norm over visible sites, the mask token at hidden ones, a projection."""

    def __init__(self, channels: int, width: int, kernel_size: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.mask_token = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.projection = (
            nn.Identity()
            if kernel_size == 1 and channels == width
            else nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
        )

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        # Layer norm treats each site by itself: what hidden ones get is replaced by the token.
        norm: Any = self.norm
        normalised = masked_batch_norm(norm, x, visible) if isinstance(norm, nn.BatchNorm2d) else norm(x)
        return self.projection(torch.where(mask_like(x, visible), normalised, self.mask_token.to(normalised.dtype)))


def plain_decode(decoder: Decoder, maps: Sequence[Tensor]) -> Tensor:
    """The decoder layer by layer, as it is written in the paper: maps deep to shallow → pixels [B, C, H, W]."""
    x = maps[0]
    block: Any
    for level, block in enumerate(decoder.blocks):
        if 0 < level < len(maps):
            x = x + maps[level]
        x = functional.relu6(block.norm1(block.conv1(block.upsample(x))), inplace=True)
        x = block.norm2(block.conv2(x))
    return decoder.projection(x)
