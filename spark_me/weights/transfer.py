"""Weights into and out of models and files: SparK, sparse encoders, and dense networks."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spark_me.errors import UserError, printable
from spark_me.files import sha256_of
from spark_me.weights.canonical import PREFIXES, Weights, from_canonical, to_canonical, weight_to_kernel
from spark_me.weights.download import is_url, local_file
from spark_me.weights.expected import ENCODER, SPARK, architecture_in, check_tensors, require_numbers
from spark_me.weights.files import bare_state, check_target, read_content, read_state, stated_encoder, write_state
from spark_me.weights.layouts import DENSE, KERNEL, SPARK_ME

_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What `load_weights` found."""

    encoder: str
    layout: str
    notes: tuple[str, ...]
    """What the file lacks or the model has no place for; logged as warnings too."""


def load_weights(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Loaded:
    """Load weights of any known layout into a model; either all of them fit, or the model stays as it is.

    A whole-model file fills a SparK model with decoder and mask tokens; one of the encoder alone, or with the other
    kind of decoder, leaves those as they are, and says so. The classifier head may be absent on either side, which is
    said too.

    Args:
        model: a SparK model, its encoder, or a dense network: `get_model`'s, torchvision's, timm's or one's own.
        source: path or URL of a .pth or .safetensors file, or a state dict.

    Raises:
        UserError: if the source cannot be read or holds what is no finite number, or its layout is not known.
        WeightsError: for missing or unexpected keys, and for other shapes, with the likely cause.
    """
    model = _unwrapped(model)
    target = model.state_dict()
    if isinstance(source, Mapping):
        where = "the state dict"
        state = bare_state(source, where, shapes_alone=all(tensor.is_meta for tensor in target.values()))
    else:
        where, state = str(source), read_state(local_file(source))
    require_numbers(state, where, like=target)
    own = weights_of(model)
    weights = to_canonical(state, where, likely=own.architecture)
    notes = weights.notes + _check(weights, own, where)
    for name, key in own.keys.items():
        if name in weights.tensors:
            shape = target[key].shape  # the canonical one is equal, but for what the model's own layout declares
            fill = weight_to_kernel if own.layout == "fcmae" and key.endswith(KERNEL) else Tensor.reshape
            target[key] = fill(weights.tensors[name], shape)
    model.load_state_dict(target, strict=True)
    for note in notes:
        _log.warning("%s: %s", printable(where), note)
    return Loaded(weights.encoder, weights.layout, notes)


def export_weights(model: nn.Module, layout: str = "torchvision") -> dict[str, Tensor]:
    """A model's weights as the state dict of another layout, on the CPU, independent of the model.

    Args:
        model: a SparK model, its encoder, or a dense network: `get_model`'s, torchvision's, timm's or one's own.
        layout: torchvision, timm, official, mmpretrain, detectron2, fcmae or spark_me. Decoder and mask tokens are left
            out where the layout has no place for them: fcmae has one for the decoder "block", official and mmpretrain
            for "unet". "dense", for any encoder: the dense network's own names.

    Raises:
        UserError: for an unknown layout, one that cannot hold the encoder, or a model that is none of these.
    """
    state, _, _ = from_canonical(weights_of(_unwrapped(model)), layout)
    # Encoders keep kernels in another order of memory.
    plain = torch.contiguous_format
    return {key: tensor.detach().to("cpu", copy=True, memory_format=plain) for key, tensor in state.items()}


def weights_of(model: nn.Module) -> Weights:
    """A model's own tensors, by the encoder that it has by name where it is one of those.

    Raises:
        UserError: if it is neither a SparK model nor a convnet.
    """
    state, encoder = model.state_dict(), getattr(model, "encoder", model)
    try:
        return to_canonical(
            state, "the model", likely=getattr(encoder, "network", getattr(encoder, "encoder_name", None))
        )
    except UserError as error:
        whole: Any = model if hasattr(model, "densify") else None
        try:
            architecture = architecture_in(model if whole is None else whole.encoder)
        except UserError:
            architecture = None
        if architecture is None:
            raise error from None
    prefix = "" if whole is None else ENCODER
    keys = {str(architecture.canonical(name)): prefix + name for name in architecture.shapes}
    keys |= {name: name for name in state if whole is not None and name.startswith(SPARK)}
    tensors = {name: state[key] for name, key in keys.items()}
    return Weights(architecture, DENSE if whole is None else SPARK_ME, tensors, keys)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in what training wrappers make of it."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in model.state_dict()):
            return _unwrapped(model.get_submodule(prefix[:-1]))
    return model


def _check(weights: Weights, own: Weights, where: str) -> tuple[str, ...]:
    """Compare weights with a model's own, part by part, and say which parts only one of them has."""
    shared = weights.parts & own.parts
    check_tensors(
        {name: shape for name, shape in _shapes(weights).items() if weights.architecture.part_of(name) in shared},
        {name: shape for name, shape in _shapes(own).items() if own.architecture.part_of(name) in shared},
        f"{where}: does not fit the model",
        architecture=own.architecture,
        causes=(
            [f"the file holds a {weights.encoder}, the model is a {own.encoder}: take the one encoder for both"]
            if weights.encoder != own.encoder
            else []
        ),
        label=lambda name: own.keys.get(name, name),
    )
    kept, dropped = own.parts - shared, weights.parts - shared
    return tuple(
        [f"has no {text}: the model keeps its own" for part, text in own.architecture.texts().items() if part in kept]
        + [
            f"{text} left out: the model has none"
            for part, text in weights.architecture.texts().items()
            if part in dropped
        ]
    )


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}


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
