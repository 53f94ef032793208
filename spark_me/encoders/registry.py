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
    drop_path: float
    """Default stochastic depth of the last block."""


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


# Drop path of the published recipes; none was published for the two small ones, which need none.
ENCODERS: dict[str, EncoderEntry] = {
    "resnet18": EncoderEntry(_resnet("resnet18"), drop_path=0.0),
    "resnet34": EncoderEntry(_resnet("resnet34"), drop_path=0.0),
    "resnet50": EncoderEntry(_resnet("resnet50"), drop_path=0.05),
    "resnet101": EncoderEntry(_resnet("resnet101"), drop_path=0.08),
    "resnet152": EncoderEntry(_resnet("resnet152"), drop_path=0.10),
    "resnet200": EncoderEntry(_resnet("resnet200"), drop_path=0.15),
}


def list_encoders() -> list[str]:
    """Names that `build_encoder` and `spark_me.build_model` accept."""
    return list(ENCODERS)


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
    if name not in ENCODERS:
        close = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(ENCODERS)}"
        raise UserError(f"unknown encoder {name!r}: {hint}")
    entry = ENCODERS[name]
    return entry.build(in_channels, entry.drop_path if drop_path is None else drop_path)
