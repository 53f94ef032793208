"""The dense hierarchical decoder (paper, section 3.3)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spark_me.errors import UserError
from spark_me.initial_weights import INITIAL_WEIGHTS, InitialWeights
from spark_me.upsampling import pays_off, upsample_and_convolve


class DecoderBlock(nn.Module):
    """Twice the resolution, half the width: transposed conv 4×4 s2, then two 3×3 convs with norm, ReLU6 between."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, in_channels, 4, stride=2, padding=1)
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Cin, h, w] → [B, Cout, 2h, 2w]."""
        if self.upsample.bias is not None and pays_off(x, self.conv1.out_channels):
            x = upsample_and_convolve(x, self.upsample.weight, self.upsample.bias, self.conv1.weight)
        else:
            x = self.conv1(self.upsample(x))
        return self.norm2(self.conv2(_ReLU6.apply(self.norm1(x))))


class Decoder(nn.Module):
    """From densified features to pixels: one block per factor of two, scale i's map is added before block i.

    Attributes:
        widths: channels that the maps need, deep to shallow; one more than there are blocks.
    """

    def __init__(self, width: int, patch_size: int, out_channels: int, init: str = "official") -> None:
        """
        Args:
            width: channels at the deepest scale; it halves at each block.
            patch_size: P; log2(P) blocks bring the grid back to pixels.
            out_channels: channels of the images.
            init: whose initial weights, a name in `INITIAL_WEIGHTS`.

        Raises:
            UserError: if the width cannot be halved that often.
        """
        super().__init__()
        depth = patch_size.bit_length() - 1
        if width <= 0 or width % 2**depth:
            raise UserError(f"model.decoder_width={width} must be a multiple of {2**depth}: it halves {depth} times")
        self.widths = [width // 2**level for level in range(depth + 1)]
        self.blocks = nn.ModuleList(DecoderBlock(*pair) for pair in zip(self.widths, self.widths[1:]))
        self.projection = nn.Conv2d(self.widths[-1], out_channels, 1)
        self._initialise(INITIAL_WEIGHTS[init])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Densified maps, deep to shallow, [B, widths[i], fh·2^i, fw·2^i] → normalised pixels [B, C, H, W]."""
        x = maps[0]
        for level, block in enumerate(self.blocks):
            if 0 < level < len(maps):
                x = x + maps[level]
            x = block(x)
        return self.projection(x)

    def _initialise(self, initial: InitialWeights) -> None:
        """Kaiming normal (fan-out) for transposed convolutions, as the source says for the others; biases zero."""
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Conv2d):
                initial.fill(module.weight)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class _ReLU6(torch.autograd.Function):
    """ReLU6 in place. Its gradient follows from the output; torch's own in-place version copies its input first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.clamp_(0, 6))
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, out, 0.0, 6.0)


def patch_loss(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Squared error, mean over each patch, then mean over the hidden patches only (paper, section 3.3).

    Args:
        prediction, target: [B, patches, P·P·C]; the target is normalised per patch.
        hidden: bool [B, patches], True where the patch was hidden from the encoder.

    Returns:
        A scalar; predicting zero scores about 1.0.
    """
    return _hidden_errors(prediction, target, hidden).sum() / hidden.sum()


def image_losses(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """`patch_loss` of each image alone: [B]; NaN where none of its patches is hidden."""
    return _hidden_errors(prediction, target, hidden).sum(dim=1) / hidden.sum(dim=1)


def _hidden_errors(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """[B, patches], 0 where not hidden."""
    error = (prediction - target).square().mean(dim=2)
    return torch.where(hidden, error, 0)
