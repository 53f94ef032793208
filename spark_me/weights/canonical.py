"""The one form that all layouts convert to and from: the dense network's own names and shapes."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spark_me.errors import UserError, shown
from spark_me.networks import ENCODERS, list_encoders, require_known
from spark_me.weights.expected import (
    COUNTER,
    ENCODER,
    HEAD,
    SPARK,
    Architecture,
    Shape,
    WeightsError,
    architecture_of,
    check_tensors,
)
from spark_me.weights.layouts import (
    FAMILIES,
    KERNEL,
    LAYOUTS,
    OWN,
    Layout,
    choose_layout,
    layout_names,
    own_layout,
    without_ones,
)


def kernel_to_weight(kernel: Tensor, kernel_size: int) -> Tensor:
    """MinkowskiEngine's kernel to torch's weight [Cout, Cin/groups, k, k]: both keep a group's outputs together.

    Args:
        kernel: [K, Cin/groups, Cout]; [Cin/groups, Cout] of a 1×1 convolution of stride 1; [K, C] of a depthwise one,
            whose weight is [C, 1, k, k].
        kernel_size: k.
    """
    return kernel.reshape(kernel_size, kernel_size, -1, kernel.shape[-1]).permute(3, 2, 1, 0).contiguous()


def weight_to_kernel(weight: Tensor, kernel_shape: tuple[int, ...]) -> Tensor:
    """Inverse of `kernel_to_weight`.

    Args:
        weight: [Cout, Cin, k, k]; [C, 1, k, k] of a depthwise convolution.
        kernel_shape: the shape that the layer's `kernel` has: its rank depends on the layer.
    """
    return weight.permute(3, 2, 1, 0).reshape(kernel_shape).contiguous()


# What training wrappers (DDP, torch.compile) put before every name.
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Weights:
    """The weights of one model.

    Attributes:
        architecture: of its encoder.
        layout: the name of the layout that they came in.
        tensors: canonical name → tensor, in the order of the dense network's state dict, then densifying and decoder.
        keys: canonical name → the key that it had.
        notes: what a user should know of what was filled in.
    """

    architecture: Architecture
    layout: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def encoder(self) -> str:
        """Name of the encoder."""
        return self.architecture.name

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.architecture.in_channels

    @property
    def num_classes(self) -> int | None:
        """Of the classifier; None without one."""
        return self.architecture.classes(self.tensors)

    @property
    def parts(self) -> set[str]:
        """Which of encoder, neck, classifier, densify, decoder and block (see `Architecture.part_of`) are there."""
        return {self.architecture.part_of(name) for name in self.tensors}


class _Reading(NamedTuple):
    """How the keys of a state dict may be understood.

    Attributes:
        layout: that they follow.
        network: key → name in the dense network.
        spark: key → name in densifying or the decoder.
        unknown: the others, but for those that are dropped.
    """

    layout: Layout
    network: dict[str, str]
    spark: dict[str, str]
    unknown: list[str]


def to_canonical(
    state: Mapping[str, Tensor], where: str, encoder: str | None = None, likely: str | Architecture | None = None
) -> Weights:
    """Read a bare state dict of any known layout.

    Args:
        state: key → tensor.
        where: the file, for messages.
        encoder: which encoder it must be; found from the keys and sizes when None: one of `list_encoders()`.
        likely: an encoder that it may be of, too; tried first.

    Raises:
        UserError: for an unknown layout or encoder.
        WeightsError: for missing and unexpected keys and for other shapes.
    """
    state = _without_prefixes(state)
    if encoder is None:
        return _read(state, where, *_nearest(state, where, likely))
    require_known(encoder)
    try:
        return _read(state, where, *_nearest(state, where, encoder, alone=True))
    except WeightsError as error:
        try:
            held = to_canonical(state, where)  # only whole files say for certain what they hold
        except UserError:
            raise error from None
        if held.encoder == encoder:
            raise
        message = f"{where}: not the tensors of {encoder} in {held.layout} layout: it holds a {held.encoder}"
        raise WeightsError(message, error.missing, error.unexpected, error.mismatched) from None


def from_canonical(weights: Weights, name: str) -> tuple[dict[str, Tensor], Layout, tuple[str, ...]]:
    """Write weights in the layout called `name`.

    Returns:
        The bare state dict, the layout, and notes on what it leaves out and its readers need.

    Raises:
        UserError: for an unknown layout, or one that cannot hold the encoder.
    """
    architecture = weights.architecture
    layout = choose_layout(name, architecture, weights.parts)
    state: dict[str, Tensor] = {}
    for canonical, tensor in weights.tensors.items():
        key = layout.key_of(canonical)
        if key is not None and architecture.part_of(canonical) in layout.parts:
            shape = layout.shape(key, tuple(tensor.shape))
            state[key] = weight_to_kernel(tensor, shape) if layout.is_kernel(key) else _shaped(tensor, shape)
    state |= {key: torch.zeros(shape) for key, shape in layout.unused.items()}
    gone = weights.parts - set(layout.parts)
    left_out = [text for part, text in architecture.texts().items() if part in gone]
    return state, layout, (*(f"{text} left out: {name} has no place for it" for text in left_out), *layout.hints)


def dense_state(weights: Weights, classifier: bool) -> dict[str, Tensor]:
    """The state dict of the dense network, with what follows its maps or without, as `build_network` needs it."""
    parts = (ENCODER, HEAD) if classifier else (ENCODER,)
    return {name.partition(".")[2]: tensor for name, tensor in weights.tensors.items() if name.startswith(parts)}


def _read(state: Mapping[str, Tensor], where: str, reading: _Reading, architecture: Architecture) -> Weights:
    layout = reading.layout
    keys = _canonical_names(reading, architecture)
    tensors = {name: state[key] for name, key in keys.items()}
    counters = _missing_counters(tensors)
    tensors |= counters
    architecture = architecture.of_images(tensors.get(ENCODER + architecture.image_weight))
    needed = architecture.expected(tensors)
    theirs = {name: layout.key_of(name) or name for name in needed}
    shapes = {name: layout.shape(theirs[name], shape) for name, shape in needed.items()}
    called = own_layout(architecture).name if layout.is_own else layout.name
    try:
        check_tensors(
            {name: _but_for_ones(tensor.shape, shapes.get(name)) for name, tensor in tensors.items()},
            shapes,
            f"{where}: not the tensors of {architecture.name} in {called} layout",
            architecture=architecture,
            label=lambda name: keys.get(name) or theirs.get(name, name),
        )
    except WeightsError as error:
        _refuse_kernels(error.unexpected, where)
        raise
    tensors = {
        name: kernel_to_weight(tensors[name].reshape(shapes[name]), shape[-1])
        if layout.is_kernel(theirs[name])
        else _shaped(tensors[name], shape)
        for name, shape in needed.items()
    }
    notes: tuple[str, ...] = ("no num_batches_tracked in the file: set to 0",) if counters else ()
    if any(key.startswith(layout.foreign) for key in state):
        notes += (f"decoder left out: {layout.name}'s is of another kind",)
    return Weights(architecture, called, tensors, keys, notes)


def _nearest(
    state: Mapping[str, Tensor], where: str, likely: Architecture | str | None, *, alone: bool = False
) -> tuple[_Reading, Architecture]:
    """The reading and the encoder whose names differ least from these; sizes decide between equal names.

    Sizes are numbers of elements: they do not depend on how a kernel is laid out. `likely` is tried first; unless it is
    to stand `alone`, the published families and registered encoders follow, until one fits.
    """
    readings = [_reading(state, layout) for layout in (OWN, *(each for each in LAYOUTS if not each.is_own))]
    best: tuple[tuple[int, int], _Reading, Architecture] | None = None
    absent: UserError | None = None
    for reading, encoder in _candidates(readings, likely, alone):
        try:
            architecture = architecture_of(encoder) if isinstance(encoder, str) else encoder
            if encoder is likely and not (reading.layout.is_own or reading.layout.holds(architecture)):
                continue
            apart = _distance(state, reading, architecture)
        except UserError as error:  # its library is not installed
            absent = absent or error
            continue
        if apart is not None and (best is None or apart < best[0]):
            best = apart, reading, architecture
        if apart == (0, 0):
            break
    if best is not None:
        return best[1:]
    _refuse_kernels(state, where)
    if absent is not None:
        raise UserError(f"{where}: {absent}")
    first = ", ".join(map(shown, [*state][:4])) or "none"
    raise UserError(
        f"{where}: its tensors follow no known layout (first keys: {first}): spark_me reads "
        f"{', '.join(layout_names())} checkpoints of ResNets and ConvNeXts, and those of an encoder that is named"
    )


def _reading(state: Mapping[str, Tensor], layout: Layout) -> _Reading:
    reading = _Reading(layout, {}, {}, [])
    for key in state:
        name = layout.name_of(key)
        if key in layout.unused or key.startswith(layout.foreign):
            continue
        if name is None:
            reading.unknown.append(key)
        else:
            (reading.spark if layout.spark and name.startswith(SPARK) else reading.network)[key] = name
    return reading


def _candidates(
    readings: Sequence[_Reading], likely: Architecture | str | None, alone: bool
) -> Iterator[tuple[_Reading, Architecture | str]]:
    """Readings with the encoders that they may be of."""
    if likely is not None:
        yield from ((each, likely) for each in readings)
    if alone:
        return
    for family in FAMILIES:
        fit = [each for each in readings if each.layout.family in (None, family) and family.has(each.network.values())]
        known = max((len(each.network) for each in fit), default=0)
        yield from ((each, name) for each in fit if len(each.network) == known for name in family.encoders)
    anyones = [each for each in readings if each.layout.family is None]
    yield from ((each, name) for name in list_encoders() if name not in ENCODERS for each in anyones)


def _distance(state: Mapping[str, Tensor], reading: _Reading, architecture: Architecture) -> tuple[int, int] | None:
    """How many names and how many sizes are others; None if no name is the same."""
    found = {name: state[key].numel() for key, name in reading.network.items()}
    if not any(name.endswith(COUNTER) for name in found):
        found |= dict.fromkeys(_counters(found), 1)
    shapes = architecture.shapes
    missing, unexpected, both = shapes.keys() - found.keys(), found.keys() - shapes.keys(), found.keys() & shapes.keys()
    both -= {architecture.image_weight, *architecture.classifier}  # their sizes depend on more than the encoder
    sizes = [name for name in both if found[name] != math.prod(shapes[name])]
    if not both:
        return None
    if not sizes and not (unexpected and architecture.classifier):  # else it need not be traced, which takes time
        unexpected = {name for name in unexpected if architecture.canonical(name) is None}
        missing &= architecture.encoder
    return len(reading.unknown) + len(unexpected) + len(missing), len(sizes)


def _canonical_names(reading: _Reading, architecture: Architecture) -> dict[str, str]:
    """Canonical name → key, without the tensors that no computation reads and those of another kind of decoder."""
    layout, keys = reading.layout, {}
    names = {key: architecture.canonical(name) for key, name in reading.network.items()} | reading.spark
    for key in (*names, *reading.unknown):
        name = names.get(key)
        fits = name is not None and layout.key_of(name) == key and architecture.part_of(name) in layout.parts
        keys[name if fits and name else f"unknown:{key}"] = key
    return keys


def _without_prefixes(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _without_prefixes({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state


def _shaped(tensor: Tensor, shape: Shape) -> Tensor:
    """The tensor itself where the shape is its own; else a view, with more or fewer sizes of one."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def _but_for_ones(found: Shape, needed: Shape | None) -> Shape:
    """The needed shape where the one found differs from it by sizes of one alone; else the one found."""
    return needed if needed is not None and without_ones(found) == without_ones(needed) else tuple(found)


def _missing_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for num_batches_tracked where a file holds none at all: torch 0.4 and frozen norms keep none."""
    if any(name.endswith(COUNTER) for name in tensors):
        return {}
    return {name: torch.zeros((), dtype=torch.long) for name in _counters(tensors)}


def _counters(names: Iterable[str]) -> list[str]:
    return [name.removesuffix("running_var") + COUNTER for name in names if name.endswith("running_var")]


def _refuse_kernels(names: Iterable[str], where: str) -> None:
    """Files of spark_me's first version hold MinkowskiEngine's kernels.

    Raises:
        UserError: if these are its names.
    """
    kernel = next((name for name in names if name.endswith(KERNEL)), None)
    if kernel is not None:
        raise UserError(
            f"{where}: written by an earlier spark_me (it holds MinkowskiEngine's kernels, such as {shown(kernel)}): "
            "convert it with that version, to torchvision's or timm's layout"
        )
