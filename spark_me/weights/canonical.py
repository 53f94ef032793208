"""The one form that all layouts convert to and from: canonical names, dense convolution weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spark_me.errors import UserError, shown
from spark_me.weights.architectures import FAMILY_OF, IMAGE_TENSORS, encoder_tensors, model_tensors
from spark_me.weights.kernels import kernel_to_weight, weight_to_kernel
from spark_me.weights.layout_rules import Layout
from spark_me.weights.layouts import choose_layout, detect_layout
from spark_me.weights.rows import COUNTER, TensorSpec
from spark_me.weights.strict import check_tensors

# What training wrappers (DDP, torch.compile) put before every name.
PREFIXES = ("module.", "_orig_mod.")
OPTIONAL_PARTS = {"decoder": "decoder with mask tokens", "norm": "final norm", "fc": "classifier head"}
"""What a checkpoint may lack, in words; densifying comes and goes with the decoder."""
_DECODER_WIDTH = ("decoder.blocks.0.conv1.weight", "decoder.blocks.0.norm1.weight")
"""Tensors whose first size is the decoder's width."""


@dataclass(frozen=True)
class Weights:
    """The weights of one model.

    Attributes:
        encoder: a name of `spark_me.list_encoders()`.
        layout: the name of the layout that they came in.
        tensors: canonical name → tensor, in the order of the model's state dict.
        keys: canonical name → the key that it had.
        notes: what a user should know of what was filled in.
    """

    encoder: str
    layout: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> set[str]:
        """Which of encoder, densify, decoder, norm (before a classifier) and fc (the classifier) are there."""
        return {part_of(name) for name in self.tensors}


def part_of(name: str) -> str:
    """The part of the model that a canonical name belongs to: encoder, densify, decoder, norm or fc."""
    return name.partition(".")[0]


def to_canonical(state: Mapping[str, Tensor], where: str, encoder: str | None = None) -> Weights:
    """Read a bare state dict of any known layout.

    Args:
        state: key → tensor.
        where: the file, for messages.
        encoder: which encoder it must be; found from the keys and sizes when None.

    Raises:
        UserError: for an unknown layout or encoder.
        WeightsError: for missing and unexpected keys and for other shapes.
    """
    if encoder is not None and encoder not in FAMILY_OF:
        raise UserError(f"unknown encoder {encoder!r}: choose one of {', '.join(FAMILY_OF)}")
    state = _without_prefixes(state)
    layout = detect_layout(state, where)
    keys = _canonical_names(state, layout, where)
    tensors = {name: state[key] for name, key in keys.items()}
    counters = _missing_counters(tensors)
    tensors |= counters
    held = nearest_encoder(tensors)
    # Only whole files say for certain what they hold.
    other = encoder not in (None, held) and _expected(held, tensors).keys() == tensors.keys()
    causes = [f"it holds a {held}"] if other else []
    encoder = encoder or held
    specs = _expected(encoder, tensors)
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: layout.shape(name, spec, encoder) for name, spec in specs.items()},
        f"{where}: not the tensors of {encoder} in {layout.name} layout",
        causes=causes,
        label=lambda name: keys.get(name) or layout.from_canonical(name, specs.get(name)),
    )
    dense = {
        name: kernel_to_weight(tensors[name], spec.shape[-1])
        if layout.is_kernel(name, spec)
        else _shaped(tensors[name], spec.shape)
        for name, spec in specs.items()
    }
    notes: tuple[str, ...] = ("no num_batches_tracked in the file: set to 0",) if counters else ()
    if any(key.startswith(layout.foreign) for key in state):
        notes += (f"decoder left out: {layout.name}'s is of another kind",)
    return Weights(encoder, layout.name, dense, keys, notes)


def from_canonical(weights: Weights, name: str) -> tuple[dict[str, Tensor], Layout, tuple[str, ...]]:
    """Write weights in the layout called `name`.

    Returns:
        The bare state dict, the layout, and notes on what it leaves out and its readers need.

    Raises:
        UserError: for an unknown layout, or one that cannot hold the encoder.
    """
    layout = choose_layout(name, weights.encoder, weights.parts)
    specs = _expected(weights.encoder, weights.tensors)
    state: dict[str, Tensor] = {}
    for canonical, tensor in weights.tensors.items():
        if part_of(canonical) in layout.parts:
            spec = specs[canonical]
            shape = layout.shape(canonical, spec, weights.encoder)
            convert = weight_to_kernel if layout.is_kernel(canonical, spec) else _shaped
            state[layout.from_canonical(canonical, spec)] = convert(tensor, shape)
    state |= {key: torch.zeros(shape) for key, shape in layout.unused.items()}
    left_out = [text for part, text in OPTIONAL_PARTS.items() if part in weights.parts - set(layout.parts)]
    return state, layout, (*(f"{text} left out: {name} has no place for it" for text in left_out), *layout.hints)


def nearest_encoder(tensors: Mapping[str, Tensor]) -> str:
    """The encoder whose names differ least from these; sizes decide between encoders of equal names.

    Sizes are numbers of elements: they do not depend on how a kernel is laid out.
    """
    found = {name: tensor.numel() for name, tensor in tensors.items() if part_of(name) == "encoder"}

    def distance(encoder: str) -> tuple[int, int]:
        specs = encoder_tensors(encoder)
        other_sizes = [name for name, spec in specs.items() if found.get(name) != math.prod(spec.shape)]
        return len(found.keys() ^ specs.keys()), len(other_sizes)

    return min(FAMILY_OF, key=distance)


def _without_prefixes(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _without_prefixes({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state


def _canonical_names(state: Mapping[str, Tensor], layout: Layout, where: str) -> dict[str, str]:
    """Canonical name → key, without the tensors that no computation reads and those of another kind of decoder."""
    keys: dict[str, str] = {}
    for key in state:
        if key not in layout.unused and not key.startswith(layout.foreign):
            first = keys.setdefault(layout.to_canonical(key), key)
            if first != key:
                raise UserError(f"{where}: {shown(first)} and {shown(key)} are the same tensor: remove one of them")
    return keys


def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor itself where the shape is its own; else a view, with more or fewer sizes of one."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def _missing_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for num_batches_tracked where a file holds none at all: torch 0.4 and frozen norms keep none."""
    if any(name.endswith(COUNTER) for name in tensors):
        return {}
    norms = [name.removesuffix("running_var") for name in tensors if name.endswith("running_var")]
    return {norm + COUNTER: torch.zeros((), dtype=torch.long) for norm in norms}


def _expected(encoder: str, tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The tensors of a model with this encoder and the parts, channels, decoder width and classes of these."""
    parts = {part_of(name) for name in tensors}
    # The first convolution's size says the channels, however its kernel is laid out.
    stems = {
        n: spec for n, spec in encoder_tensors(encoder, in_channels=1).items() if n in IMAGE_TENSORS & tensors.keys()
    }
    channels = [tensors[name].numel() // math.prod(spec.shape) for name, spec in stems.items()]
    widths = [tensors[name].shape[0] for name in _DECODER_WIDTH if name in tensors]
    classes = [tensors[name].shape[0] for name in ("fc.weight", "fc.bias") if name in tensors]
    return model_tensors(
        encoder,
        in_channels=channels[0] if channels else 3,
        decoder_width=next(iter(widths), 512) if parts & {"densify", "decoder"} else None,
        num_classes=next(iter(classes), None),
        final_norm="norm" in parts,
    )
