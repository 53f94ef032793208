"""Which tensors a model holds: names and shapes, as tables. Needs neither torch nor MinkowskiEngine.

Names are canonical: the encoder's are torchvision's under `encoder.`, the rest is named as in `spark_me.spark.SparK`, a
classifier is `fc.`. Weights of convolutions are dense here, [Cout, Cin, k, k].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from spark_me.encoders.registry import RESNETS

Shape = tuple[int, ...]
PATCH_SIZE = 32
COUNTER = "num_batches_tracked"


class TensorSpec(NamedTuple):
    """One tensor of a model."""

    shape: Shape
    kernel_shape: Shape | None = None
    """Of a sparse convolution: the shape that MinkowskiEngine keeps its kernel in."""


@dataclass(frozen=True)
class Conv:
    """A sparse convolution without bias; channels are named, a `stride` of None is the stage's."""

    name: str
    inputs: str
    outputs: str
    kernel_size: int
    stride: int | None = 1

    def tensors(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, TensorSpec]]:
        """Names and shapes, for the sizes of this stage."""
        inputs, outputs, volume = sizes[self.inputs], sizes[self.outputs], self.kernel_size**2
        stride = sizes["stride"] if self.stride is None else self.stride
        kernel = (inputs, outputs) if volume == stride == 1 else (volume, inputs, outputs)
        yield f"{self.name}.weight", TensorSpec((outputs, inputs, self.kernel_size, self.kernel_size), kernel)


@dataclass(frozen=True)
class Norm:
    """A batch normalisation."""

    name: str
    channels: str

    def tensors(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, TensorSpec]]:
        """Names and shapes, for the sizes of this stage."""
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            yield f"{self.name}.{leaf}", TensorSpec((sizes[self.channels],))
        yield f"{self.name}.{COUNTER}", TensorSpec(())


Layer = Conv | Norm


@dataclass(frozen=True)
class Family:
    """Encoders that share their blocks.

    Attributes:
        encoders: name → (block, number of blocks in each stage).
        stem: layers before the first stage; the first one takes the image.
        blocks: name → layers of a residual block.
        expansion: name of a block → its output channels over its width.
        shortcut: layers of a shortcut that changes channels or resolution.
    """

    encoders: Mapping[str, tuple[str, tuple[int, int, int, int]]]
    stem: tuple[Layer, ...]
    blocks: Mapping[str, tuple[Layer, ...]]
    expansion: Mapping[str, int]
    shortcut: tuple[Layer, ...]
    widths: tuple[int, int, int, int]


RESNET = Family(
    encoders=RESNETS,
    stem=(Conv("conv1", "image", "stem", 7, stride=2), Norm("bn1", "stem")),
    blocks={
        "BasicBlock": (
            Conv("conv1", "in", "width", 3, stride=None),
            Norm("bn1", "width"),
            Conv("conv2", "width", "width", 3),
            Norm("bn2", "width"),
        ),
        "Bottleneck": (
            Conv("conv1", "in", "width", 1),
            Norm("bn1", "width"),
            Conv("conv2", "width", "width", 3, stride=None),
            Norm("bn2", "width"),
            Conv("conv3", "width", "out", 1),
            Norm("bn3", "out"),
        ),
    },
    expansion={"BasicBlock": 1, "Bottleneck": 4},
    shortcut=(Conv("downsample.0", "in", "out", 1, stride=None), Norm("downsample.1", "out")),
    widths=(64, 128, 256, 512),
)
FAMILIES: Mapping[str, Family] = {"resnet": RESNET}
ENCODER_FAMILY: Mapping[str, str] = {name: family for family, table in FAMILIES.items() for name in table.encoders}


IMAGE_TENSORS = {f"encoder.{table.stem[0].name}.weight" for table in FAMILIES.values()}
"""Canonical names of the weights whose inputs are the image's channels."""


def model_tensors(
    encoder: str, in_channels: int = 3, decoder_width: int | None = None, num_classes: int | None = None
) -> dict[str, TensorSpec]:
    """The tensors of a model, in the order of its state dict.

    Args:
        encoder: one of `ENCODER_FAMILY`.
        in_channels: channels of the images.
        decoder_width: of a whole SparK model; None for the encoder alone.
        num_classes: of a classifier; None if there is none.
    """
    tensors = encoder_tensors(encoder, in_channels)
    if decoder_width is not None:
        tensors |= decoder_tensors(encoder, in_channels, decoder_width)
    if num_classes is not None:
        tensors |= head_tensors(encoder, num_classes)
    return tensors


def encoder_tensors(encoder: str, in_channels: int = 3) -> dict[str, TensorSpec]:
    """The tensors of an encoder, in the order of its state dict."""
    family = FAMILIES[ENCODER_FAMILY[encoder]]
    block, depths = family.encoders[encoder]
    channels = family.widths[0]
    tensors = _named("encoder.", family.stem, {"image": in_channels, "stem": channels})
    for stage, (width, depth) in enumerate(zip(family.widths, depths), start=1):
        for index in range(depth):
            stride = 2 if stage > 1 and index == 0 else 1
            sizes = {"in": channels, "width": width, "out": width * family.expansion[block], "stride": stride}
            changes = stride > 1 or sizes["in"] != sizes["out"]
            layers = family.blocks[block] + (family.shortcut if changes else ())
            tensors |= _named(f"encoder.layer{stage}.{index}.", layers, sizes)
            channels = sizes["out"]
    return tensors


def decoder_tensors(encoder: str, in_channels: int = 3, width: int = 512) -> dict[str, TensorSpec]:
    """The tensors of densifying and of the decoder, `width` channels at the deepest scale."""
    family = FAMILIES[ENCODER_FAMILY[encoder]]
    expansion = family.expansion[family.encoders[encoder][0]]
    levels = PATCH_SIZE.bit_length() - 1
    widths = [width // 2**level for level in range(levels + 1)]
    tensors: dict[str, TensorSpec] = {}
    for level, channels in enumerate(size * expansion for size in reversed(family.widths)):
        prefix, kernel_size = f"densify.{level}.", 3 if level else 1
        tensors |= _named(prefix, (Norm("norm", "channels"),), {"channels": channels})
        tensors[f"{prefix}mask_token"] = TensorSpec((1, channels, 1, 1))
        if level or channels != widths[0]:  # equal widths need no projection at the deepest scale
            tensors[f"{prefix}projection.weight"] = TensorSpec((widths[level], channels, kernel_size, kernel_size))
            tensors[f"{prefix}projection.bias"] = TensorSpec((widths[level],))
    for level, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        prefix, sizes = f"decoder.blocks.{level}.", {"in": inputs, "out": outputs}
        tensors[f"{prefix}upsample.weight"] = TensorSpec((inputs, inputs, 4, 4))
        tensors[f"{prefix}upsample.bias"] = TensorSpec((inputs,))
        for index, side in ((1, "in"), (2, "out")):
            tensors[f"{prefix}conv{index}.weight"] = TensorSpec((sizes[side], inputs, 3, 3))
            tensors |= _named(prefix, (Norm(f"norm{index}", side),), sizes)
    tensors["decoder.projection.weight"] = TensorSpec((in_channels, widths[-1], 1, 1))
    tensors["decoder.projection.bias"] = TensorSpec((in_channels,))
    return tensors


def head_tensors(encoder: str, num_classes: int) -> dict[str, TensorSpec]:
    """The tensors of a linear classifier on the deepest features."""
    family = FAMILIES[ENCODER_FAMILY[encoder]]
    features = family.widths[-1] * family.expansion[family.encoders[encoder][0]]
    return {"fc.weight": TensorSpec((num_classes, features)), "fc.bias": TensorSpec((num_classes,))}


def _named(prefix: str, layers: tuple[Layer, ...], sizes: Mapping[str, int]) -> dict[str, TensorSpec]:
    return {prefix + name: spec for layer in layers for name, spec in layer.tensors(sizes)}
