"""Weights into and out of models: SparK, bare encoders, and plain dense networks."""

import logging
import os
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from spark_me.errors import UserError, printable
from spark_me.weights.canonical import OPTIONAL_PARTS, Weights, from_canonical, part_of, to_canonical
from spark_me.weights.download import local_file
from spark_me.weights.files import bare_state, read_state
from spark_me.weights.kernels import weight_to_kernel
from spark_me.weights.layout_rules import KERNEL, WEIGHT
from spark_me.weights.own import dense_state, load_same
from spark_me.weights.strict import check_tensors, require_numbers

_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What `load_weights` found."""

    encoder: str
    layout: str
    notes: tuple[str, ...]
    """What the file lacks or the model has no place for; logged as warnings too."""


def load_weights(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Loaded:
    """Load weights of any known layout into a model; either all of them fit, or the model stays as it is.

    A whole-model file fills a SparK model with decoder and mask tokens; one of the encoder alone leaves those as they
    are, and says so. The classifier head may be absent on either side, which is said too.

    Args:
        model: a SparK model, one of its encoders, or a dense network with torchvision's or timm's names (`get_model`).
            With an encoder of one's own, a state dict or file of the very same names loads.
        source: path or URL of a .pth or .safetensors file, or a state dict.

    Raises:
        UserError: if the source cannot be read or holds what is no finite number, or the layout of source or model is
            not known.
        WeightsError: for missing or unexpected keys, and for other shapes, with the likely cause.
    """
    target = model.state_dict()
    if isinstance(source, Mapping):
        where = "the state dict"
        state = bare_state(source, where, shapes_alone=all(tensor.is_meta for tensor in target.values()))
    else:
        where, state = str(source), read_state(local_file(source))
    require_numbers(state, where, like=target)
    try:
        own = to_canonical(target, "the model")
    except UserError:  # no table knows an encoder of one's own
        load_same(model, state, where)
        return Loaded(type(getattr(model, "encoder", model)).__name__, "spark_me", ())
    weights = to_canonical(state, where)
    notes = weights.notes + _check(weights, own, where)
    for name, tensor in weights.tensors.items():
        key = own.keys.get(name)
        if key is not None:
            shape = target[key].shape  # the canonical one is equal, but for what the model's layout declares
            target[key] = weight_to_kernel(tensor, shape) if key.endswith(KERNEL) else tensor.reshape(shape)
    model.load_state_dict(target, strict=True)
    for note in notes:
        _log.warning("%s: %s", printable(where), note)
    return Loaded(weights.encoder, weights.layout, notes)


def export_weights(model: nn.Module, layout: str = "torchvision") -> dict[str, Tensor]:
    """A model's weights as the state dict of another layout, on the CPU, independent of the model.

    Args:
        model: a SparK model, one of its encoders, or a dense network with torchvision's or timm's names (`get_model`).
        layout: torchvision, timm, official, mmpretrain, detectron2, fcmae or spark_me. Decoder and mask tokens are left
            out where the layout has no place for them. "dense", for any encoder, one's own too: its own names, with the
            weights of dense layers.

    Raises:
        UserError: for an unknown layout, one that cannot hold the encoder, or a model that is none of these.
    """
    if layout == "dense":
        state = dense_state(model)
    else:
        state, _, _ = from_canonical(to_canonical(model.state_dict(), "the model"), layout)
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()}


def _check(weights: Weights, own: Weights, where: str) -> tuple[str, ...]:
    """Compare weights with a model's own, part by part, and say which parts only one of them has."""
    shared = weights.parts & own.parts
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in weights.tensors.items() if part_of(name) in shared},
        {name: tuple(tensor.shape) for name, tensor in own.tensors.items() if part_of(name) in shared},
        f"{where}: does not fit the model",
        causes=(
            [f"the file holds a {weights.encoder}, the model is a {own.encoder}: take the one encoder for both"]
            if weights.encoder != own.encoder
            else []
        ),
        # Shapes are compared as those of dense weights, so a kernel is called a weight here.
        label=lambda name: own.keys.get(name, name).replace(KERNEL, WEIGHT),
    )
    kept, dropped = own.parts - shared, weights.parts - shared
    return tuple(
        [f"has no {text}: the model keeps its own" for part, text in OPTIONAL_PARTS.items() if part in kept]
        + [f"{text} left out: the model has none" for part, text in OPTIONAL_PARTS.items() if part in dropped]
    )
