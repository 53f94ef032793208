"""Encoders by name. This table needs no MinkowskiEngine; building an encoder does."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spark_me.errors import UserError

if TYPE_CHECKING:
    from spark_me.encoders.base import SparseEncoder


@dataclass(frozen=True)
class EncoderEntry:
    """How to build an encoder, and what the published recipes use with it."""

    build: Callable[[int, float], "SparseEncoder"]
    """(in_channels, drop_path) → the encoder."""
    drop_path: float = 0.0
    """Default stochastic depth of the last block."""
    total_stride: int = 32
    """The patch size P; image sizes are multiples of it."""


# Block and number of blocks in each of the four stages.
RESNETS: dict[str, tuple[str, tuple[int, int, int, int]]] = {
    "resnet18": ("BasicBlock", (2, 2, 2, 2)),
    "resnet34": ("BasicBlock", (3, 4, 6, 3)),
    "resnet50": ("Bottleneck", (3, 4, 6, 3)),
    "resnet101": ("Bottleneck", (3, 4, 23, 3)),
    "resnet152": ("Bottleneck", (3, 8, 36, 3)),
    "resnet200": ("Bottleneck", (3, 24, 36, 3)),
}

# Version, number of blocks and channels in each of the four stages.
CONVNEXTS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
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


def _resnet(name: str) -> Callable[[int, float], "SparseEncoder"]:
    block, depths = RESNETS[name]

    def build(in_channels: int, drop_path: float) -> "SparseEncoder":
        from spark_me.encoders import resnet

        return resnet.ResNet(getattr(resnet, block), depths, in_channels, drop_path)

    return build


def _convnext(name: str) -> Callable[[int, float], "SparseEncoder"]:
    def build(in_channels: int, drop_path: float) -> "SparseEncoder":
        from spark_me.encoders import convnext

        version, depths, widths = CONVNEXTS[name]
        return convnext.ConvNeXt(version, depths, widths, in_channels, drop_path)

    return build


# Drop path of the published recipes: ResNet-50 to -200, ConvNeXt Small to Large, ConvNeXt V2 Tiny. Where none was
# published, smaller networks get less of it than their published relatives, the smallest none; networks of the sizes of
# ConvNeXt Base and Large get what those have, and Huge no more than that.
ENCODERS: dict[str, EncoderEntry] = {
    "resnet18": EncoderEntry(_resnet("resnet18"), drop_path=0.0),
    "resnet34": EncoderEntry(_resnet("resnet34"), drop_path=0.0),
    "resnet50": EncoderEntry(_resnet("resnet50"), drop_path=0.05),
    "resnet101": EncoderEntry(_resnet("resnet101"), drop_path=0.08),
    "resnet152": EncoderEntry(_resnet("resnet152"), drop_path=0.10),
    "resnet200": EncoderEntry(_resnet("resnet200"), drop_path=0.15),
    "convnext_tiny": EncoderEntry(_convnext("convnext_tiny"), drop_path=0.1),
    "convnext_small": EncoderEntry(_convnext("convnext_small"), drop_path=0.2),
    "convnext_base": EncoderEntry(_convnext("convnext_base"), drop_path=0.3),
    "convnext_large": EncoderEntry(_convnext("convnext_large"), drop_path=0.4),
    "convnextv2_atto": EncoderEntry(_convnext("convnextv2_atto"), drop_path=0.0),
    "convnextv2_femto": EncoderEntry(_convnext("convnextv2_femto"), drop_path=0.0),
    "convnextv2_pico": EncoderEntry(_convnext("convnextv2_pico"), drop_path=0.0),
    "convnextv2_nano": EncoderEntry(_convnext("convnextv2_nano"), drop_path=0.0),
    "convnextv2_tiny": EncoderEntry(_convnext("convnextv2_tiny"), drop_path=0.2),
    "convnextv2_base": EncoderEntry(_convnext("convnextv2_base"), drop_path=0.3),
    "convnextv2_large": EncoderEntry(_convnext("convnextv2_large"), drop_path=0.4),
    "convnextv2_huge": EncoderEntry(_convnext("convnextv2_huge"), drop_path=0.4),
}


def list_encoders() -> list[str]:
    """Names that `build_encoder` and `spark_me.build_model` accept."""
    return list(ENCODERS)


def patch_size_of(name: str) -> int:
    """P, the total stride of an encoder, which need not be built for it.

    Raises:
        UserError: for an unknown name.
    """
    return _entry(name).total_stride


def register_encoder(
    name: str,
    build: Callable[[int, float], "SparseEncoder"],
    *,
    total_stride: int,
    drop_path: float = 0.0,
) -> None:
    """Make an encoder of one's own known by name: to `build_model`, to configurations and to every command.

    Args:
        name: a new name.
        build: (in_channels, drop_path) → the encoder; a subclass of `spark_me.SparseEncoder` will do.
        total_stride: the encoder's; known here so that configurations are checked without building it.
        drop_path: default stochastic depth of the last block.

    Raises:
        UserError: for a name that is taken.
    """
    if name in ENCODERS:
        raise UserError(f"encoder {name!r} exists already: register yours under another name")
    ENCODERS[name] = EncoderEntry(build, drop_path, total_stride)


def build_encoder(name: str, in_channels: int = 3, drop_path: float | None = None) -> "SparseEncoder":
    """Build a sparse encoder.

    Args:
        name: one of `list_encoders()`.
        in_channels: channels of the images.
        drop_path: stochastic depth of the last block; the encoder's published default when None.

    Raises:
        UserError: for an unknown name.
        EngineError: if MinkowskiEngine is missing.
    """
    entry = _entry(name)
    return entry.build(in_channels, entry.drop_path if drop_path is None else drop_path)


def _entry(name: str) -> EncoderEntry:
    if name not in ENCODERS:
        close = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(ENCODERS)}"
        raise UserError(f"unknown encoder {name!r}: {hint}")
    return ENCODERS[name]
