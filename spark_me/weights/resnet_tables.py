"""ResNets: their tensors, and how checkpoints name them. Canonical names are torchvision's under `encoder.`."""

from collections.abc import Iterator

from spark_me.encoders.registry import RESNETS
from spark_me.weights.layout_rules import (
    ALL_PARTS,
    MMPRETRAIN_DECODER,
    OFFICIAL_DECODER,
    OFFICIAL_UNUSED,
    Layout,
    Rules,
)
from spark_me.weights.rows import BatchNorm, Conv, Family, Group, Layer

_WIDTHS = (64, 128, 256, 512)
_STEM = (Conv("conv1", "image", "stem", 7, stride=2), BatchNorm("bn1", "stem"))
_BLOCKS: dict[str, tuple[Layer, ...]] = {
    "BasicBlock": (
        Conv("conv1", "in", "width", 3, stride=None),
        BatchNorm("bn1", "width"),
        Conv("conv2", "width", "width", 3),
        BatchNorm("bn2", "width"),
    ),
    "Bottleneck": (
        Conv("conv1", "in", "width", 1),
        BatchNorm("bn1", "width"),
        Conv("conv2", "width", "width", 3, stride=None),
        BatchNorm("bn2", "width"),
        Conv("conv3", "width", "out", 1),
        BatchNorm("bn3", "out"),
    ),
}
_SHORTCUT = (Conv("downsample.0", "in", "out", 1, stride=None), BatchNorm("downsample.1", "out"))
_EXPANSION = {"BasicBlock": 1, "Bottleneck": 4}


def _channels(encoder: str) -> tuple[int, ...]:
    return tuple(width * _EXPANSION[RESNETS[encoder][0]] for width in _WIDTHS)


def _groups(encoder: str, in_channels: int) -> Iterator[Group]:
    block, depths = RESNETS[encoder]
    yield Group("encoder.", _STEM, {"image": in_channels, "stem": _WIDTHS[0]})
    inputs = _WIDTHS[0]
    for stage, (width, outputs, depth) in enumerate(zip(_WIDTHS, _channels(encoder), depths), start=1):
        for index in range(depth):
            stride = 2 if stage > 1 and index == 0 else 1
            sizes = {"in": inputs, "width": width, "out": outputs, "stride": stride}
            changes = stride > 1 or inputs != outputs
            yield Group(f"encoder.layer{stage}.{index}.", _BLOCKS[block] + (_SHORTCUT if changes else ()), sizes)
            inputs = outputs


RESNET = Family(
    encoders=tuple(RESNETS),
    groups=_groups,
    channels=_channels,
    image_weight="encoder.conv1.weight",
    densify_norm=BatchNorm,
)

_TORCHVISION: Rules = (("fc.{leaf}", "fc.{leaf}"), ("encoder.{rest}", "{rest}"))

# Detectron2's stages count from the stem: its res2 is torchvision's layer1.
_DETECTRON2: Rules = (
    ("encoder.conv1.weight", "stem.conv1.weight"),
    ("encoder.bn1.{leaf}", "stem.conv1.norm.{leaf}"),
) + tuple(
    (f"encoder.layer{stage}.{{n}}.{ours}", f"res{stage + 1}.{{n}}.{theirs}")
    for stage in (1, 2, 3, 4)
    for ours, theirs in (
        ("conv{i}.weight", "conv{i}.weight"),
        ("bn{i}.{leaf}", "conv{i}.norm.{leaf}"),
        ("downsample.0.weight", "shortcut.weight"),
        ("downsample.1.{leaf}", "shortcut.norm.{leaf}"),
    )
)

# The official encoder files and timm's bear torchvision's names, so all three are read as torchvision.
RESNET_LAYOUTS: tuple[Layout, ...] = (
    Layout("torchvision", RESNETS, "layer1.", _TORCHVISION, parts=("encoder", "fc")),
    Layout("timm", RESNETS, "layer1.", _TORCHVISION, parts=("encoder", "fc")),
    Layout("official", RESNETS, "layer1.", _TORCHVISION, parts=("encoder",)),
    Layout(
        "official",
        RESNETS,
        "sparse_encoder.sp_cnn.layer1.",
        (("encoder.{rest}", "sparse_encoder.sp_cnn.{rest}"), *OFFICIAL_DECODER),
        parts=("encoder", "densify", "decoder"),
        wrapper="module",
        unused=OFFICIAL_UNUSED,
    ),
    Layout(
        "mmpretrain",
        RESNETS,
        "backbone.layer1.",
        (("encoder.{rest}", "backbone.{rest}"), ("fc.{leaf}", "head.fc.{leaf}"), *MMPRETRAIN_DECODER),
        parts=ALL_PARTS,
        wrapper="state_dict",
    ),
    Layout(
        "detectron2",
        RESNETS,
        "res2.",
        _DETECTRON2,
        parts=("encoder",),
        wrapper="model",
        extras={"__author__": "spark_me", "matching_heuristics": True},
        hints=(
            "detectron2 needs MODEL.RESNETS.STRIDE_IN_1X1: False, INPUT.FORMAT: RGB and, in that order of channels, "
            "MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53], MODEL.PIXEL_STD: [58.395, 57.12, 57.375] (255 times "
            "data.mean and data.std, if the weights were trained with others)",
        ),
        pickled=True,
    ),
    Layout(
        "spark_me", RESNETS, "encoder.layer1.", (("{rest}", "{rest}"),), parts=ALL_PARTS, wrapper="model", sparse=True
    ),
    # A sparse encoder by itself.
    Layout("spark_me", RESNETS, "conv1.kernel", (("encoder.{rest}", "{rest}"),), parts=("encoder",), sparse=True),
)
