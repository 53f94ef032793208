"""Which tensors a model holds: names and shapes. Needs neither torch nor MinkowskiEngine.

Names are canonical: those of the encoder under `encoder.` (see the family's tables), the rest named as in
`spark_me.spark.SparK`; a classifier is `fc.`, a norm before it `norm.`.
"""

from collections.abc import Mapping

from spark_me.weights.convnext_tables import CONVNEXT
from spark_me.weights.resnet_tables import RESNET
from spark_me.weights.rows import BatchNorm, Family, Group, Layer, Linear, TensorSpec, tensors_of

PATCH_SIZE = 32
FAMILIES: tuple[Family, ...] = (RESNET, CONVNEXT)
FAMILY_OF: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.encoders}
IMAGE_TENSORS = {family.image_weight for family in FAMILIES}
"""Canonical names of the weights whose inputs are the image's channels."""


def model_tensors(
    encoder: str,
    in_channels: int = 3,
    decoder_width: int | None = None,
    num_classes: int | None = None,
    final_norm: bool = False,
) -> dict[str, TensorSpec]:
    """The tensors of a model, in the order of its state dict.

    Args:
        encoder: one of `FAMILY_OF`.
        in_channels: channels of the images.
        decoder_width: of a whole SparK model; None for the encoder alone.
        num_classes: of a classifier; None if there is none.
        final_norm: include the norm before a classifier, where the family has one, without a classifier too.
    """
    tensors = encoder_tensors(encoder, in_channels)
    if decoder_width is not None:
        tensors |= decoder_tensors(encoder, in_channels, decoder_width)
    family = FAMILY_OF[encoder]
    head: tuple[Layer, ...] = family.final_norm if final_norm or num_classes is not None else ()
    sizes = {"features": family.channels(encoder)[-1]}
    if num_classes is not None:
        head, sizes = (*head, Linear("fc", "features", "classes")), sizes | {"classes": num_classes}
    return tensors | tensors_of(Group("", head, sizes))


def encoder_tensors(encoder: str, in_channels: int = 3) -> dict[str, TensorSpec]:
    """The tensors of an encoder, in the order of its state dict."""
    groups = FAMILY_OF[encoder].groups(encoder, in_channels)
    return {name: spec for group in groups for name, spec in tensors_of(group).items()}


def decoder_tensors(encoder: str, in_channels: int = 3, width: int = 512) -> dict[str, TensorSpec]:
    """The tensors of densifying and of the decoder, `width` channels at the deepest scale."""
    family = FAMILY_OF[encoder]
    levels = PATCH_SIZE.bit_length() - 1
    widths = [width // 2**level for level in range(levels + 1)]
    tensors: dict[str, TensorSpec] = {}
    for level, channels in enumerate(reversed(family.channels(encoder))):
        prefix, kernel_size = f"densify.{level}.", 3 if level else 1
        tensors |= tensors_of(Group(prefix, (family.densify_norm("norm", "channels"),), {"channels": channels}))
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
            tensors |= tensors_of(Group(prefix, (BatchNorm(f"norm{index}", side),), sizes))
    tensors["decoder.projection.weight"] = TensorSpec((in_channels, widths[-1], 1, 1))
    tensors["decoder.projection.bias"] = TensorSpec((in_channels,))
    return tensors
