"""What a sparse encoder and SparK on it are compared with: the dense simulation, and the dense network without a mask.

They share the decoder's parameters with `spark_me.spark` and no computation with it: this is the oracle of the tests,
too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from spark_me.decoder import Decoder
from spark_me.dense import strip
from spark_me.masked_dense import MaskedDense
from spark_me.masking import upsample_visible
from spark_me.networks import dense_network
from spark_me.trace import Trace, graph_of_maps, normalises_by_layer, trace


def headless(name: str) -> Trace:
    """A network by name, without the parameters behind its last map."""
    traced = trace(dense_network(name))
    strip(traced.network, {*traced.state_names})
    return traced


def dense_encoder(name: str) -> nn.Module:
    """The ordinary dense encoder: images [B, 3, H, W] → its maps [B, C_i, H/s_i, W/s_i]."""
    traced = headless(name)
    return fx.GraphModule(traced.network, graph_of_maps(traced))


def masked_encoder(name: str) -> MaskedDense:
    """The dense simulation of masking: (images, visible) → its maps, zero where hidden."""
    traced = headless(name)
    return MaskedDense(traced.network, traced.taps)


class MaskedDenseSparK(nn.Module):
    """The whole method on the simulation; parameters are named as in `spark_me.spark.SparK`, the encoder's below
    `encoder.network`.
    """

    def __init__(self, traced: Trace, in_channels: int = 3, decoder_width: int = 512) -> None:
        """
        Args:
            traced: the dense network; it is the simulation's own.
            in_channels: C of the images.
            decoder_width: channels of the decoder at its deepest scale.
        """
        super().__init__()
        self.patch_size = traced.strides[-1]
        self.encoder: nn.Module = MaskedDense(traced.network, traced.taps)
        self.decoder = Decoder(decoder_width, self.patch_size, in_channels)
        norm = _LayerNorm if normalises_by_layer(traced.network) else nn.BatchNorm2d
        self.densify = nn.ModuleList(
            MaskedDensify(width_in, width_out, 3 if level else 1, norm)
            for level, (width_in, width_out) in enumerate(zip(traced.channels[::-1], self.decoder.widths))
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

    def load_sparse(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a `SparK` model's state dict; what its encoder has no place for is left as it is."""
        self.load_state_dict({**self.state_dict(), **self.from_sparse(state)})

    def from_sparse(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors named as in a `SparK` model (weights, or their gradients), as they are here."""
        prefix = "encoder."
        return {
            f"{prefix}network.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: x
            for key, x in state.items()
        }


class DenseSparK(MaskedDenseSparK):
    """The simulation's decoder and loss on an ordinary dense encoder that sees every patch: the step's yardstick."""

    def __init__(self, name: str, decoder_width: int) -> None:
        super().__init__(headless(name), decoder_width=decoder_width)
        self.encoder = dense_encoder(name)
        for densify in self.densify:
            del densify.mask_token

    def predict(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normalised pixels [B, C, H, W]; nothing is hidden."""
        scales: Any = zip(self.densify, reversed(self.encoder(images)))
        return plain_decode(self.decoder, [densify.projection(densify.norm(x)) for densify, x in scales])


class MaskedDensify(nn.Module):
    """Norm over visible sites, the mask token at hidden ones, a projection."""

    def __init__(self, channels: int, width: int, kernel_size: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(channels)
        # not a child: the norm's parameters have one name
        self.__dict__["_masked_norm"] = MaskedDense(self.norm, [("", 1)])
        self.mask_token = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.projection = (
            nn.Identity()
            if kernel_size == 1 and channels == width
            else nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
        )

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """[B, C, h, w] → [B, width, h, w]."""
        mask = upsample_visible(visible, x.shape[2] // visible.shape[1])[:, None]
        if isinstance(self.norm, nn.BatchNorm2d):
            normalised = self.__dict__["_masked_norm"](x, visible)[0]
        else:  # it treats each site by itself: what hidden ones get is replaced by the token
            normalised = self.norm(x)
        return self.projection(torch.where(mask, normalised, self.mask_token.to(normalised.dtype)))


class _LayerNorm(nn.LayerNorm):
    """Of maps [B, C, h, w], over the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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
