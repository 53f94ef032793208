"""From dense maps to pixels: SparK's hierarchical decoder (its paper, section 3.3), and FCMAE's block (2301.00808)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spark_me import masking
from spark_me.errors import UserError
from spark_me.initial_weights import INITIAL_WEIGHTS, InitialWeights

COMPOSING_PRODUCTS = 16 * 9
"""Products for each triple of channels that composing the kernels costs: all taps of one with all of the other."""


def pays_off(x: Tensor, channels: int) -> bool:
    """Whether x [B, C, h, w] has so many pixels that composing kernels costs a quarter of the gain at most."""
    saved = 4 * x.shape[0] * 4 * x.shape[2] * x.shape[3]  # for each pair of channels
    return saved >= 4 * COMPOSING_PRODUCTS * channels


def upsample_and_convolve(x: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor) -> Tensor:
    """`conv2d(conv_transpose2d(x, up_weight, up_bias, stride=2, padding=1), weight, padding=1)`.

    Args:
        x: [B, Cin, h, w].
        up_weight: [Cin, Cmid, 4, 4].
        up_bias: [Cmid].
        weight: [Cout, Cmid, 3, 3].

    Returns:
        [B, Cout, 2h, 2w], channels last in memory.
    """
    batch, _, height, width = x.shape
    constant = (weight.sum(dim=(2, 3)) @ up_bias).repeat(4)
    x, *sides = _WithSides.apply(x.contiguous(memory_format=torch.channels_last))
    phases = functional.conv2d(x, _compose(up_weight, weight), constant, padding=1)  # [B, (2 2 Cout), h, w]
    phases = phases.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, -1)
    out = phases.transpose(2, 3).reshape(batch, 2 * height, 2 * width, -1)
    borders = [border.to(out.dtype) for border in _beyond_border(sides, up_weight, up_bias, weight)]
    return _SubtractBorders.apply(out, *borders).permute(0, 3, 1, 2)


def _compose(up_weight: Tensor, weight: Tensor) -> Tensor:
    """From the 3×3 inputs around a site to its 2×2 outputs: [(2 2 Cout), Cin, 3, 3], channels last as the maps."""
    # One transposed convolution of stride 2 has both effects. Its 6×6 kernel, at t = y − 2i for input i and output y
    # (t from −2): the sum over k of weight[k] · up_weight[t + k].
    products = torch.einsum("imuv,omkl->kliouv", up_weight, weight)  # every tap with every tap, once
    full = torch.stack(
        [
            functional.pad(products[down, across], (2 - across, across, 2 - down, down))
            for down in range(3)
            for across in range(3)
        ]
    ).sum(dim=0)  # [Cin, Cout, 6, 6]
    # Output 2j + phase takes input j + d through t = phase − 2d, for d = −1, 0, 1. In slices: a list of indices would
    # make the host wait for a GPU.
    kernels = [full[:, :, down::2, across::2].flip(2, 3) for down in (0, 1) for across in (0, 1)]
    return torch.stack([kernel.permute(1, 2, 3, 0) for kernel in kernels]).flatten(0, 1).permute(0, 3, 1, 2)


def _beyond_border(sides: Sequence[Tensor], up_weight: Tensor, up_bias: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """What the composed kernel adds to the first and last row and column of the output, and must not.

    It sees the upsampled map go on one pixel beyond its border, where the 3×3 convolution has its zero padding. That
    ring is a one-dimensional transposed convolution of the input's own border; corners count with the rows.
    """
    taps = (up_weight[:, :, 0], up_weight[:, :, 3], up_weight[:, :, :, 0], up_weight[:, :, :, 3])
    top, bottom, left, right = (
        functional.conv_transpose1d(side, tap, up_bias, stride=2) for side, tap in zip(sides, taps)
    )
    left, right = (functional.pad(side[:, :, 1:-1], (1, 1)) for side in (left, right))
    return (
        functional.conv1d(top, weight[:, :, 0]),
        functional.conv1d(bottom, weight[:, :, 2]),
        functional.conv1d(left, weight[:, :, :, 0]),
        functional.conv1d(right, weight[:, :, :, 2]),
    )


class _WithSides(torch.autograd.Function):
    """A map [B, C, H, W] and its first and last row and column: autograd's own slices would make a map of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.view_as(x), *(side.clone() for side in _sides(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *of_sides: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.channels_last)
        for part, of_side in zip(_sides(gradient), of_sides):
            part += of_side
        return gradient


class _SubtractBorders(torch.autograd.Function):
    """Subtract from the border of a map [B, H, W, C] in place: autograd's own slices would copy the map four times.

    It takes the map itself, not its view [B, C, H, W]: in place on a view, autograd copies as well.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, *borders: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        for part, border in zip(_sides(out.permute(0, 3, 1, 2)), borders):
            part -= border
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(-part for part in _sides(gradient.permute(0, 3, 1, 2)))


def _sides(x: Tensor) -> tuple[Tensor, ...]:
    """First and last row and column of x [B, C, H, W], as views [B, C, length]."""
    return x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]


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
    """SparK's UNet: one block per factor of two, scale i's map is added before block i.

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


class GlobalResponseNorm(nn.Module):
    """Weighs each channel by its response in the whole image, relative to the mean over channels (ConvNeXt V2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] → the same."""
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x + self.weight * (x * (response / (response.mean(dim=-1, keepdim=True) + 1e-6))) + self.bias


class ConvNeXtBlock(nn.Module):
    """ConvNeXt V2's residual block: depthwise 7×7, layer norm, two layers at each position, GELU and GRN between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GlobalResponseNorm(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] → the same."""
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        branch = self.pwconv2(self.grn(functional.gelu(self.pwconv1(branch))))
        return x + branch.permute(0, 3, 1, 2)


class ConvNeXtDecoder(nn.Module):
    """FCMAE's: one block on the deepest map, then a linear layer from each position to its patch's pixels.

    Attributes:
        widths: channels of the one map that it needs.
    """

    def __init__(self, width: int, patch_size: int, out_channels: int, init: str = "official") -> None:
        """
        Args:
            width: channels of the block.
            patch_size: P.
            out_channels: channels of the images.
            init: has no say here: convolutions and linear layers start as ConvNeXt's.

        Raises:
            UserError: if the width is not positive.
        """
        super().__init__()
        if width <= 0:
            raise UserError(f"model.decoder_width={width} must be positive")
        self.widths = [width]
        self.patch_size = patch_size
        self.block = ConvNeXtBlock(width)
        self.prediction = nn.Conv2d(width, patch_size**2 * out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                start_as_convnext(module)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The densified map [B, width, fh, fw], by itself in a list → normalised pixels [B, C, H, W]."""
        x = self.prediction(self.block(maps[0]))
        return masking.unpatchify(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]), self.patch_size)


def start_as_convnext(layer: nn.Conv2d | nn.Linear) -> None:
    """Weights of a truncated normal distribution with deviation 0.02, biases zero."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


DECODERS: dict[str, type[Decoder] | type[ConvNeXtDecoder]] = {"unet": Decoder, "block": ConvNeXtDecoder}
"""By the value of `model.decoder`."""


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
