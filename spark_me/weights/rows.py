"""What the tables of architectures are made of: layers, and the tensors that each of them holds.

Channels are named in a layer and looked up in the sizes of the place where it stands.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, ...]
COUNTER = "num_batches_tracked"


class TensorSpec(NamedTuple):
    """One tensor of a model."""

    shape: Shape
    """In a dense model; a convolution's weight is [Cout, Cin / groups, k, k]."""
    sparse_shape: Shape | None = None
    """In a sparse model, where that is another."""
    kernel: bool = False
    """Whether a sparse model keeps it as MinkowskiEngine's `kernel`, with the offsets in that order."""


Tensors = Iterator[tuple[str, TensorSpec]]


@dataclass(frozen=True)
class Conv:
    """A convolution; a `stride` of None is the stage's."""

    name: str
    inputs: str
    outputs: str
    kernel_size: int
    stride: int | None = 1
    bias: bool = False

    def tensors(self, sizes: Mapping[str, int]) -> Tensors:
        """Names and shapes, for these sizes."""
        inputs, outputs, volume = sizes[self.inputs], sizes[self.outputs], self.kernel_size**2
        stride = sizes["stride"] if self.stride is None else self.stride
        kernel = (inputs, outputs) if volume == stride == 1 else (volume, inputs, outputs)
        yield f"{self.name}.weight", TensorSpec((outputs, inputs, self.kernel_size, self.kernel_size), kernel, True)
        if self.bias:
            yield f"{self.name}.bias", TensorSpec((outputs,), (1, outputs))


@dataclass(frozen=True)
class DepthwiseConv:
    """A convolution of every channel by itself, with bias."""

    name: str
    channels: str
    kernel_size: int

    def tensors(self, sizes: Mapping[str, int]) -> Tensors:
        """Names and shapes, for these sizes."""
        channels, size = sizes[self.channels], self.kernel_size
        yield f"{self.name}.weight", TensorSpec((channels, 1, size, size), (size**2, channels), True)
        yield f"{self.name}.bias", TensorSpec((channels,), (1, channels))


@dataclass(frozen=True)
class Linear:
    """A linear layer with bias."""

    name: str
    inputs: str
    outputs: str

    def tensors(self, sizes: Mapping[str, int]) -> Tensors:
        """Names and shapes, for these sizes."""
        yield f"{self.name}.weight", TensorSpec((sizes[self.outputs], sizes[self.inputs]))
        yield f"{self.name}.bias", TensorSpec((sizes[self.outputs],))


@dataclass(frozen=True)
class BatchNorm:
    """A batch normalisation, with its running statistics."""

    name: str
    channels: str

    def tensors(self, sizes: Mapping[str, int]) -> Tensors:
        """Names and shapes, for these sizes."""
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            yield f"{self.name}.{leaf}", TensorSpec((sizes[self.channels],))
        yield f"{self.name}.{COUNTER}", TensorSpec(())


@dataclass(frozen=True)
class Scales:
    """Parameters of one number a channel: of a layer norm, a global response norm, a layer scale."""

    names: tuple[str, ...]
    channels: str

    def tensors(self, sizes: Mapping[str, int]) -> Tensors:
        """Names and shapes, for these sizes."""
        for name in self.names:
            yield name, TensorSpec((sizes[self.channels],))


def layer_norm(name: str, channels: str) -> Scales:
    """A layer normalisation."""
    return Scales((f"{name}.weight", f"{name}.bias"), channels)


Layer = Conv | DepthwiseConv | Linear | BatchNorm | Scales


class Group(NamedTuple):
    """Layers in one place of a model: what their names begin with, and their sizes."""

    prefix: str
    layers: tuple[Layer, ...]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Family:
    """Encoders that share their layers.

    Attributes:
        encoders: their names.
        groups: (encoder, image channels) → its layers, in the order of its state dict.
        channels: encoder → channels of its four scales, shallow to deep.
        image_weight: the weight whose inputs are the image's channels.
        densify_norm: (name, channels) → the norm with which densifying begins.
        final_norm: norms between the deepest features and a classifier.
    """

    encoders: tuple[str, ...]
    groups: Callable[[str, int], Iterator[Group]]
    channels: Callable[[str], tuple[int, ...]]
    image_weight: str
    densify_norm: Callable[[str, str], Layer]
    final_norm: tuple[Layer, ...] = ()


def tensors_of(group: Group) -> dict[str, TensorSpec]:
    """Names and shapes of a group."""
    return {group.prefix + name: spec for layer in group.layers for name, spec in layer.tensors(group.sizes)}
