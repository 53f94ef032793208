"""Files from one layout to another; needs neither MinkowskiEngine nor torchvision."""

import os
from pathlib import Path
from typing import NamedTuple

from spark_me.files import sha256_of
from spark_me.weights.canonical import Weights, from_canonical, to_canonical
from spark_me.weights.download import is_url, local_file
from spark_me.weights.files import check_target, read_state, write_state
from spark_me.weights.strict import require_numbers


class Conversion(NamedTuple):
    """What `convert` did."""

    encoder: str
    source_layout: str
    layout: str
    notes: tuple[str, ...]
    """What was filled in or left out."""


def convert(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], to: str, encoder: str | None = None
) -> Conversion:
    """Convert a checkpoint file; its layout and encoder are found from its keys.

    Args:
        source: path or URL of a .pth or .safetensors file of any known layout.
        destination: .pth, .pt or .safetensors file to write, for detectron2 also .pkl; replaced only when the new one
            is whole. It carries a model card: source, its SHA-256 and layout, encoder, layout and its version.
        to: torchvision, timm, official, mmpretrain, detectron2, fcmae or spark_me. "official" is the whole model where
            the source has a decoder; otherwise the encoder, a ConvNeXt's with its classifier. "torchvision" has no
            ConvNeXt V2, "fcmae" (that of ConvNeXt V2's authors) nothing else. "detectron2" has no ConvNeXt, and its own
            names of a ResNet, which its checkpointer matches to a backbone; a note says what configuration that needs.
        encoder: which encoder the source must hold; anything else is an error.

    Raises:
        UserError: if the source cannot be read, fits no known layout, `to` cannot hold its encoder, or the destination
            cannot be written.
        WeightsError: for missing or unexpected keys, and for other shapes.
    """
    target = Path(destination)
    check_target(target, to, source)
    path = local_file(source)
    state = read_state(path)
    require_numbers(state, str(source))
    return write_weights(to_canonical(state, str(source), encoder), source, target, to)


def write_weights(weights: Weights, source: str | os.PathLike[str], target: Path, to: str) -> Conversion:
    """Write weights that were read from `source`, as `convert` does.

    Raises:
        UserError: if `to` cannot hold their encoder, or the target cannot be written.
    """
    path = local_file(source)
    state, layout, left_out = from_canonical(weights, to)
    card = {
        "source": source if isinstance(source, str) and is_url(source) else path.name,
        "source_sha256": sha256_of(path),
        "source_layout": weights.layout,
        "encoder": weights.encoder,
        "layout": layout.name,
        "layout_version": str(layout.version),
    }
    write_state(target, state, layout, card)
    return Conversion(weights.encoder, weights.layout, layout.name, weights.notes + left_out)
