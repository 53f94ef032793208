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
