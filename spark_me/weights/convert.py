"""Files from one layout to another; needs no MinkowskiEngine."""

import os
from pathlib import Path
from typing import NamedTuple

from spark_me.files import sha256_of
from spark_me.weights.canonical import Weights, from_canonical, to_canonical
from spark_me.weights.download import is_url, local_file
from spark_me.weights.files import bare_state, check_target, read_content, stated_encoder, write_state
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
    """Convert a checkpoint file; its layout is found from its keys.

    The encoder is found so as well if it is one of `list_encoders()`, or read from the model card or configuration of
    a file of spark_me.

    Args:
        source: path or URL of a .pth or .safetensors file of any known layout.
        destination: .pth, .pt or .safetensors file to write, for detectron2 also .pkl; replaced only when the new one
            is whole. It carries a model card: source, its SHA-256 and layout, encoder, layout and its version.
        to: torchvision, timm, official, mmpretrain, detectron2, fcmae, spark_me, or "dense" for the encoder's own
            names. "official" is the whole model where
            the source has a decoder; otherwise the encoder, a ConvNeXt's with its classifier. "torchvision" has no
            ConvNeXt V2, "fcmae" (that of ConvNeXt V2's authors) nothing else. "detectron2" has no ConvNeXt, and its own
            names of a ResNet, which its checkpointer matches to a backbone; a note says what configuration that needs.
            Of encoders beyond ResNets and ConvNeXts there are their library's own names and spark_me's.
        encoder: which encoder the source must hold; anything else is an error. Any that `build_model` takes.

    Raises:
        UserError: if the source cannot be read, fits no known layout, `to` cannot hold its encoder, or the destination
            cannot be written.
        WeightsError: for missing or unexpected keys, and for other shapes.
    """
    target = Path(destination)
    check_target(target, to, source)
    path = local_file(source)
    content = read_content(path)
    state = bare_state(content, str(source))
    require_numbers(state, str(source))
    weights = to_canonical(state, str(source), encoder, likely=stated_encoder(path, content))
    return write_weights(weights, source, target, to)


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
