"""ConvNeXt V1 and V2: their tensors, and how checkpoints name them.

Canonical names are those of the original code, under `encoder.`.
"""

from collections.abc import Iterator

from spark_me.encoders.registry import CONVNEXTS
from spark_me.weights.layout_rules import (
    ALL_PARTS,
    MMPRETRAIN_DECODER,
    OFFICIAL_DECODER,
    OFFICIAL_UNUSED,
    Layout,
    Ones,
    Rules,
)
from spark_me.weights.rows import Conv, DepthwiseConv, Family, Group, Layer, Linear, Scales, layer_norm

_STEM = (Conv("0", "image", "out", 4, stride=4, bias=True), layer_norm("1", "out"))
_DOWNSAMPLE = (layer_norm("0", "in"), Conv("1", "in", "out", 2, stride=2, bias=True))
_DEPTHWISE = (DepthwiseConv("dwconv", "width", 7), layer_norm("norm", "width"))
_EXPAND, _REDUCE = Linear("pwconv1", "width", "hidden"), Linear("pwconv2", "hidden", "width")
# By version: V1 scales every block's output, V2 normalises global responses instead.
_BLOCKS: dict[int, tuple[Layer, ...]] = {
    1: (Scales(("gamma",), "width"), *_DEPTHWISE, _EXPAND, _REDUCE),
    2: (*_DEPTHWISE, _EXPAND, Scales(("grn.gamma", "grn.beta"), "hidden"), _REDUCE),
}


def _groups(encoder: str, in_channels: int) -> Iterator[Group]:
    version, depths, widths = CONVNEXTS[encoder]
    yield Group("encoder.downsample_layers.0.", _STEM, {"image": in_channels, "out": widths[0]})
    for stage, (inputs, outputs) in enumerate(zip(widths, widths[1:]), start=1):
        yield Group(f"encoder.downsample_layers.{stage}.", _DOWNSAMPLE, {"in": inputs, "out": outputs})
    for stage, (depth, width) in enumerate(zip(depths, widths)):
        for index in range(depth):
            sizes = {"width": width, "hidden": 4 * width}
            yield Group(f"encoder.stages.{stage}.{index}.", _BLOCKS[version], sizes)


CONVNEXT = Family(
    encoders=tuple(CONVNEXTS),
    groups=_groups,
    channels=lambda encoder: CONVNEXTS[encoder][2],
    image_weight="encoder.downsample_layers.0.0.weight",
    densify_norm=layer_norm,
    final_norm=(layer_norm("norm", "features"),),
)

_V1, _V2 = (tuple(name for name, row in CONVNEXTS.items() if row[0] == version) for version in (1, 2))
# timm builds these with 1×1 convolutions for the two linear layers of a block.
TIMM_CONV_MLP = ("convnextv2_atto", "convnextv2_femto", "convnextv2_pico", "convnextv2_nano")

# In torchvision one list alternates between downsampling and stages.
_TORCHVISION: Rules = (
    ("norm.{leaf}", "classifier.0.{leaf}"),
    ("fc.{leaf}", "classifier.2.{leaf}"),
) + tuple(
    rule
    for stage in range(4)
    for rule in (
        (f"encoder.downsample_layers.{stage}.{{n}}.{{leaf}}", f"features.{2 * stage}.{{n}}.{{leaf}}"),
        *(
            (f"encoder.stages.{stage}.{{n}}.{ours}", f"features.{2 * stage + 1}.{{n}}.{theirs}")
            for ours, theirs in (
                ("gamma", "layer_scale"),
                ("dwconv.{leaf}", "block.0.{leaf}"),
                ("norm.{leaf}", "block.2.{leaf}"),
                ("pwconv1.{leaf}", "block.3.{leaf}"),
                ("pwconv2.{leaf}", "block.5.{leaf}"),
            )
        ),
    )
)

_TIMM: Rules = (
    ("norm.{leaf}", "head.norm.{leaf}"),
    ("fc.{leaf}", "head.fc.{leaf}"),
    ("encoder.downsample_layers.0.{n}.{leaf}", "stem.{n}.{leaf}"),
    *((f"encoder.downsample_layers.{i}.{{n}}.{{leaf}}", f"stages.{i}.downsample.{{n}}.{{leaf}}") for i in (1, 2, 3)),
) + tuple(
    (f"encoder.stages.{{s}}.{{n}}.{ours}", f"stages.{{s}}.blocks.{{n}}.{theirs}")
    for ours, theirs in (
        ("gamma", "gamma"),
        ("dwconv.{leaf}", "conv_dw.{leaf}"),
        ("norm.{leaf}", "norm.{leaf}"),
        ("pwconv1.{leaf}", "mlp.fc1.{leaf}"),
        ("grn.gamma", "mlp.grn.weight"),
        ("grn.beta", "mlp.grn.bias"),
        ("pwconv2.{leaf}", "mlp.fc2.{leaf}"),
    )
)

_ORIGINAL: Rules = (("norm.{leaf}", "norm.{leaf}"), ("fc.{leaf}", "head.{leaf}"), ("encoder.{rest}", "{rest}"))
_ORIGINAL_GRN = (
    Ones("encoder.stages.{s}.{n}.grn.gamma", before=3),
    Ones("encoder.stages.{s}.{n}.grn.beta", before=3),
)

_MMPRETRAIN: Rules = (
    ("norm.{leaf}", "backbone.norm3.{leaf}"),
    ("fc.{leaf}", "head.fc.{leaf}"),
    ("encoder.stages.{s}.{n}.dwconv.{leaf}", "backbone.stages.{s}.{n}.depthwise_conv.{leaf}"),
    ("encoder.stages.{s}.{n}.pwconv{i}.{leaf}", "backbone.stages.{s}.{n}.pointwise_conv{i}.{leaf}"),
    ("encoder.{rest}", "backbone.{rest}"),
    *MMPRETRAIN_DECODER,
)

# The pretraining of ConvNeXt V2's authors, on MinkowskiEngine as well but for the stem.
_FCMAE: Rules = (
    ("encoder.downsample_layers.0.{n}.{leaf}", "encoder.downsample_layers.0.{n}.{leaf}"),
    ("encoder.downsample_layers.{s}.0.{leaf}", "encoder.downsample_layers.{s}.0.ln.{leaf}"),
    ("encoder.stages.{s}.{n}.norm.{leaf}", "encoder.stages.{s}.{n}.norm.ln.{leaf}"),
    ("encoder.stages.{s}.{n}.pwconv{i}.{leaf}", "encoder.stages.{s}.{n}.pwconv{i}.linear.{leaf}"),
    ("encoder.{rest}", "encoder.{rest}"),
)

CONVNEXT_LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "torchvision",
        _V1,
        "features.1.0.layer_scale",
        _TORCHVISION,
        parts=("encoder", "norm", "fc"),
        ones=(Ones("encoder.stages.{s}.{n}.gamma", after=2),),
    ),
    Layout(
        "timm",
        CONVNEXTS,
        "stages.0.blocks.",
        _TIMM,
        parts=("encoder", "norm", "fc"),
        ones=(Ones("encoder.stages.{s}.{n}.pwconv{i}.weight", after=2, encoders=TIMM_CONV_MLP),),
    ),
    # The official encoder files bear the names of the original ConvNeXt, whose classifiers are read here too.
    Layout("official", CONVNEXTS, "downsample_layers.", _ORIGINAL, parts=("encoder", "norm", "fc"), ones=_ORIGINAL_GRN),
    Layout(
        "official",
        CONVNEXTS,
        "sparse_encoder.sp_cnn.downsample_layers.",
        (("encoder.{rest}", "sparse_encoder.sp_cnn.{rest}"), *OFFICIAL_DECODER),
        parts=("encoder", "densify", "decoder"),
        ones=_ORIGINAL_GRN,
        wrapper="module",
        unused=OFFICIAL_UNUSED,
    ),
    Layout(
        "mmpretrain",
        CONVNEXTS,
        "backbone.downsample_layers.",
        _MMPRETRAIN,
        parts=ALL_PARTS,
        wrapper="state_dict",
    ),
    # Before spark_me's own, whose names begin alike: the whole model, and its encoder by itself.
    *(
        Layout(
            "fcmae",
            _V2,
            f"{prefix}downsample_layers.1.0.ln.",
            tuple((ours, theirs.replace("encoder.", prefix)) for ours, theirs in _FCMAE),
            parts=("encoder",),
            ones=tuple(Ones(f"encoder.stages.{{s}}.{{n}}.grn.{leaf}", before=1) for leaf in ("gamma", "beta")),
            wrapper="model",
            sparse=True,
            dense=("encoder.downsample_layers.0.",),
            foreign=("proj.", "mask_token", "decoder.", "pred."),
        )
        for prefix in ("encoder.", "")
    ),
    Layout(
        "spark_me",
        CONVNEXTS,
        "encoder.downsample_layers.",
        (("{rest}", "{rest}"),),
        parts=ALL_PARTS,
        wrapper="model",
        sparse=True,
    ),
    # A sparse encoder by itself.
    Layout(
        "spark_me",
        CONVNEXTS,
        "downsample_layers.0.0.kernel",
        (("encoder.{rest}", "{rest}"),),
        parts=("encoder",),
        sparse=True,
    ),
)
