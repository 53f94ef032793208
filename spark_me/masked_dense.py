"""SparK by simulation: torchvision's dense ResNets, with an explicit mask after every layer.

This is how other implementations compute it, at full dense cost. Here it is the oracle of the tests and the baseline of
the benchmark; it shares the decoder's parameters with `spark_me.spark` and no computation with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from spark_me.decoder import Decoder
from spark_me.encoders.registry import RESNETS
from spark_me.masking import upsample_visible
from spark_me.weights.kernels import to_dense_state


class MaskedDenseResNet(nn.Module):
    """A torchvision ResNet, computed as if hidden patches did not exist. Parameter names are torchvision's."""

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

    def _stages(self) -> tuple[Any, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def _block(self, block: Any, x: Tensor, visible: Tensor) -> Tensor:
        residual = masked_batch_norm(block.bn1, block.conv1(x), visible).relu()
        residual = masked_batch_norm(block.bn2, block.conv2(residual), visible)
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            residual = masked_batch_norm(block.bn3, block.conv3(residual.relu()), visible)
        rate = self._drop_path[block]
        if self.training and rate:
            kept = torch.rand(len(x), device=x.device) >= rate
            residual = residual * (kept.to(x.dtype) / (1 - rate)).view(-1, 1, 1, 1)
        shortcut = x
        if block.downsample is not None:
            conv, norm = block.downsample
            shortcut = masked_batch_norm(norm, conv(x), visible)
        return (residual + shortcut).relu()


class MaskedDenseSparK(nn.Module):
    """The whole method on the simulation; parameters are named as in `spark_me.spark.SparK`, with dense weights."""

    def __init__(
        self, name: str, in_channels: int = 3, decoder_width: int = 512, patch_size: int = 32, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.encoder = MaskedDenseResNet(name, in_channels, drop_path)
        self.decoder = Decoder(decoder_width, patch_size, in_channels)
        self.densify = nn.ModuleList(
            MaskedDensify(width_in, width_out, 3 if level else 1)
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
        return errors[~visible.flatten(1)].mean()

    def predict(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normalised pixels [B, C, H, W]."""
        features = self.encoder(images, visible)
        return plain_decode(self.decoder, [f(x, visible) for f, x in zip(self.densify, reversed(features))])

    def load_sparse(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a `SparK` model's state dict."""
        self.load_state_dict(to_dense_state(state, self))


class MaskedDensify(nn.Module):
    """Norm over visible sites, the mask token at hidden ones, a projection."""

    def __init__(self, channels: int, width: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mask_token = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.projection = (
            nn.Identity()
            if kernel_size == 1 and channels == width
            else nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
        )

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        normalised = masked_batch_norm(self.norm, x, visible)
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


def mask_like(x: Tensor, visible: Tensor) -> Tensor:
    """`visible` [B, fh, fw] at the resolution of x [B, C, h, w]: bool [B, 1, h, w]."""
    return upsample_visible(visible, x.shape[2] // visible.shape[1])[:, None]


def mask_out(x: Tensor, visible: Tensor) -> Tensor:
    """Zero the hidden sites of x [B, C, h, w]."""
    return x * mask_like(x, visible)


def masked_batch_norm(norm: nn.BatchNorm2d, x: Tensor, visible: Tensor) -> Tensor:
    """Batch norm of x [B, C, h, w] with the statistics of visible sites; hidden sites become zero."""
    assert norm.momentum is not None
    mask = mask_like(x, visible)[:, 0]
    rows = x.permute(0, 2, 3, 1)[mask]  # [N, C]
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    normalised = functional.batch_norm(
        rows,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
    )
    dense = normalised.new_zeros(x.shape[0], *x.shape[2:], x.shape[1])
    dense[mask] = normalised
    return dense.permute(0, 3, 1, 2)
