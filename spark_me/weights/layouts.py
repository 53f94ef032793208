"""The known layouts of checkpoints: how each names and shapes the tensors of a model.

A rule pairs a name of one side with the other's; `{leaf}` stands for a parameter or statistic, `{rest}` for any
remainder, every other placeholder for a number. The first that fits counts.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

from spark_me.errors import UserError
from spark_me.weights.expected import ENCODER, SPARK, Architecture, Shape, architecture_of

Rules = tuple[tuple[str, str], ...]
KERNEL = ".kernel"
"""How the names of MinkowskiEngine's weights end."""
NETWORK = ("encoder", "neck", "classifier")
WHOLE = (*NETWORK, "densify", "decoder")
"""With SparK's decoder."""


def _through(name: str | None, tables: Iterable[Rules]) -> str | None:
    """A name after one table and the next; None if one of them does not have it."""
    for table in tables:
        name = name and _translate(name, table)
    return name


def _translate(name: str, rules: Rules) -> str | None:
    for source, target in rules:
        match = _pattern(source).fullmatch(name)
        if match:
            return target.format(**match.groupdict())
    return None


def _inverse(rules: Rules) -> Rules:
    return tuple((target, source) for source, target in rules)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    kinds = {"leaf": "weight|bias|running_mean|running_var|num_batches_tracked", "rest": ".+"}
    pieces = re.split(r"\{(\w+)\}", template)  # text, placeholder, text, …
    return re.compile(
        "".join(
            f"(?P<{piece}>{kinds.get(piece, '[0-9]+')})" if index % 2 else re.escape(piece)
            for index, piece in enumerate(pieces)
        )
    )


@dataclass(frozen=True)
class Family:
    """Encoders whose dense networks name their layers alike.

    Attributes:
        encoders: of `spark_me.networks.ENCODERS`; others may be of it, too.
        signature: matches names of some of their tensors, and of no others'.
        names: matches all names of an encoder's tensors.
    """

    encoders: tuple[str, ...]
    signature: re.Pattern[str]
    names: re.Pattern[str]

    def has(self, names: Iterable[str | None]) -> bool:
        """Whether these are names of such a network's tensors."""
        return any(name is not None and self.signature.match(name) for name in names)


RESNET = Family(
    ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"),
    re.compile(r"layer1\.\d+\.(conv|bn)\d\."),
    re.compile(r"(layer\d\.\d+\.)?(conv\d\.weight|bn\d\.\w+)|layer\d\.\d+\.downsample\.[01]\.\w+"),
)
CONVNEXT = Family(
    ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    re.compile(r"features\.\d\.\d+\.layer_scale"),
    re.compile(r"features\..+"),
)
CONVNEXT_V2 = Family(
    tuple(f"convnextv2_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")),
    re.compile(r"stages\.\d\.blocks\.\d+\.mlp\.grn\."),
    re.compile(r"(stem|stages)\..+"),
)
FAMILIES = (RESNET, CONVNEXT, CONVNEXT_V2)


@dataclass(frozen=True)
class Layout:
    """One way to name and shape the tensors of a model.

    Attributes:
        name: what `--to` takes.
        family: whose networks it can hold; None: any.
        network: from the dense network's names to this layout's, table after table.
        head: of tensors that the maps do not depend on, where that differs.
        spark: from the names of densifying and decoder to this layout's.
        parts: what a checkpoint may hold; tensors of other parts are left out when writing.
        ones: names of tensors that it keeps as vectors or matrices, each with as many sizes of one before.
        wrapper: the entry of a .pth file under which its readers expect the state dict; None for a bare one.
        extras: further plain entries that those readers expect in a .pth file.
        unused: tensors that no computation reads; dropped when reading, written as zeros.
        kernels: whether it keeps weights as MinkowskiEngine's kernels, where its names say so.
        foreign: how the keys begin of a decoder that has no counterpart here; dropped with a note.
        hints: what the readers of such a file need to be told; notes of a conversion.
        pickled: whether they also take a .pkl file of numpy arrays.
        version: raised when the names that we write change.
    """

    name: str
    family: Family | None
    network: tuple[Rules, ...] = ()
    head: tuple[Rules, ...] | None = None
    spark: Rules = ()
    parts: tuple[str, ...] = NETWORK
    ones: Mapping[str, int] = field(default_factory=dict)
    wrapper: str | None = None
    extras: Mapping[str, object] = field(default_factory=dict)
    unused: Mapping[str, Shape] = field(default_factory=dict)
    kernels: bool = False
    foreign: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    pickled: bool = False
    version: int = 1

    @property
    def is_own(self) -> bool:
        """Whether it keeps the dense network's own names."""
        return not self.network and not self.spark

    def name_of(self, key: str) -> str | None:
        """What a key stands for: a name of the dense network, or of densifying and decoder; None if for nothing."""
        return next((name for tables in self._back if (name := _through(key, tables))), None)

    def key_of(self, canonical: str) -> str | None:
        """The key of a canonical name; None if there is no place for it."""
        if canonical.startswith(SPARK):
            return _translate(canonical, self.spark)
        tables = self.network if self.head is None or canonical.startswith(ENCODER) else self.head
        return _through(canonical.partition(".")[2], tables)

    def shape(self, key: str, shape: Shape) -> Shape:
        """The shape in which it keeps a tensor that is `shape` in the dense network."""
        if self.is_kernel(key):
            outputs, inputs, *sides = shape
            return (math.prod(sides), outputs) if inputs == 1 else (math.prod(sides), inputs, outputs)
        for template, before in self.ones.items():
            if _pattern(template).fullmatch(key):
                return (1,) * before + without_ones(shape)
        return shape

    def is_kernel(self, key: str) -> bool:
        """Whether a tensor is one of MinkowskiEngine's kernels."""
        return self.kernels and key.endswith(KERNEL)

    def holds(self, architecture: Architecture) -> bool:
        """Whether it has a place for an encoder."""
        if self.family is None:
            return self.name in (architecture.library, DENSE, SPARK_ME)
        names = architecture.encoder
        fits = self.family.has(names) and all(map(self.family.names.fullmatch, names))
        return fits and all(self.key_of(ENCODER + name) for name in names)

    @cached_property
    def _back(self) -> list[tuple[Rules, ...]]:
        """What brings keys back."""
        chains = ((self.spark,) if self.spark else None, self.network, self.head)
        return [tuple(_inverse(table) for table in reversed(tables)) for tables in chains if tables is not None]


_OFFICIAL_SPARK: Rules = (
    ("densify.{n}.norm.{leaf}", "densify_norms.{n}.{leaf}"),
    ("densify.{n}.projection.{leaf}", "densify_projs.{n}.{leaf}"),
    ("densify.{n}.mask_token", "mask_tokens.{n}"),
    ("decoder.blocks.{n}.upsample.{leaf}", "dense_decoder.dec.{n}.up_sample.{leaf}"),
    ("decoder.blocks.{n}.conv1.{leaf}", "dense_decoder.dec.{n}.conv.0.{leaf}"),
    ("decoder.blocks.{n}.norm1.{leaf}", "dense_decoder.dec.{n}.conv.1.{leaf}"),
    ("decoder.blocks.{n}.conv2.{leaf}", "dense_decoder.dec.{n}.conv.3.{leaf}"),
    ("decoder.blocks.{n}.norm2.{leaf}", "dense_decoder.dec.{n}.conv.4.{leaf}"),
    ("decoder.projection.{leaf}", "dense_decoder.proj.{leaf}"),
)
_MMPRETRAIN_SPARK: Rules = (
    ("densify.{n}.norm.{leaf}", "enc_dec_norms.{n}.{leaf}"),
    ("densify.{n}.projection.{leaf}", "enc_dec_projectors.{n}.{leaf}"),
    ("densify.{n}.mask_token", "mask_tokens.{n}"),
    ("decoder.blocks.{n}.upsample.{leaf}", "neck.decoder.{n}.upsample.{leaf}"),
    ("decoder.blocks.{n}.conv{i}.{leaf}", "neck.decoder.{n}.conv_blocks.0.conv{i}.{leaf}"),
    ("decoder.blocks.{n}.norm{i}.{leaf}", "neck.decoder.{n}.conv_blocks.0.norm{i}.{leaf}"),
    ("decoder.projection.{leaf}", "neck.proj.{leaf}"),
)
_FCMAE_SPARK: Rules = (
    ("densify.projection.{leaf}", "proj.{leaf}"),
    ("densify.mask_token", "mask_token"),
    ("decoder.block.dwconv.{leaf}", "decoder.0.dwconv.{leaf}"),
    ("decoder.block.norm.{leaf}", "decoder.0.norm.{leaf}"),
    ("decoder.block.pwconv{i}.{leaf}", "decoder.0.pwconv{i}.{leaf}"),
    ("decoder.block.grn.weight", "decoder.0.grn.gamma"),
    ("decoder.block.grn.bias", "decoder.0.grn.beta"),
    ("decoder.prediction.{leaf}", "pred.{leaf}"),
)

# From each library's names to those of ConvNeXt's own code. In torchvision one list alternates between downsampling
# and stages.
_TORCHVISION: Rules = (
    ("classifier.0.{leaf}", "norm.{leaf}"),
    ("classifier.2.{leaf}", "head.{leaf}"),
) + tuple(
    rule
    for stage in range(4)
    for rule in (
        (f"features.{2 * stage}.{{n}}.{{leaf}}", f"downsample_layers.{stage}.{{n}}.{{leaf}}"),
        *(
            (f"features.{2 * stage + 1}.{{n}}.{theirs}", f"stages.{stage}.{{n}}.{original}")
            for theirs, original in (
                ("layer_scale", "gamma"),
                ("block.0.{leaf}", "dwconv.{leaf}"),
                ("block.2.{leaf}", "norm.{leaf}"),
                ("block.3.{leaf}", "pwconv1.{leaf}"),
                ("block.5.{leaf}", "pwconv2.{leaf}"),
            )
        ),
    )
)
_TIMM: Rules = (
    ("head.norm.{leaf}", "norm.{leaf}"),
    ("head.fc.{leaf}", "head.{leaf}"),
    ("stem.{n}.{leaf}", "downsample_layers.0.{n}.{leaf}"),
    ("stages.{s}.downsample.{n}.{leaf}", "downsample_layers.{s}.{n}.{leaf}"),
) + tuple(
    (f"stages.{{s}}.blocks.{{n}}.{theirs}", f"stages.{{s}}.{{n}}.{original}")
    for theirs, original in (
        ("gamma", "gamma"),
        ("conv_dw.{leaf}", "dwconv.{leaf}"),
        ("norm.{leaf}", "norm.{leaf}"),
        ("mlp.fc1.{leaf}", "pwconv1.{leaf}"),
        ("mlp.grn.weight", "grn.gamma"),
        ("mlp.grn.bias", "grn.beta"),
        ("mlp.fc2.{leaf}", "pwconv2.{leaf}"),
    )
)

# From ConvNeXt's own names to mmpretrain's, and to those of the pretraining of ConvNeXt V2's authors, which is on
# MinkowskiEngine but for the stem.
_MMPRETRAIN: Rules = (
    ("norm.{leaf}", "backbone.norm3.{leaf}"),
    ("head.{leaf}", "head.fc.{leaf}"),
    ("stages.{s}.{n}.dwconv.{leaf}", "backbone.stages.{s}.{n}.depthwise_conv.{leaf}"),
    ("stages.{s}.{n}.pwconv{i}.{leaf}", "backbone.stages.{s}.{n}.pointwise_conv{i}.{leaf}"),
    ("{rest}", "backbone.{rest}"),
)
_FCMAE: Rules = (
    ("downsample_layers.0.{n}.{leaf}", "downsample_layers.0.{n}.{leaf}"),
    ("downsample_layers.{s}.0.{leaf}", "downsample_layers.{s}.0.ln.{leaf}"),
    ("downsample_layers.{s}.1.weight", "downsample_layers.{s}.1.kernel"),
    ("downsample_layers.{s}.1.bias", "downsample_layers.{s}.1.bias"),
    ("stages.{s}.{n}.dwconv.weight", "stages.{s}.{n}.dwconv.kernel"),
    ("stages.{s}.{n}.dwconv.bias", "stages.{s}.{n}.dwconv.bias"),
    ("stages.{s}.{n}.norm.{leaf}", "stages.{s}.{n}.norm.ln.{leaf}"),
    ("stages.{s}.{n}.pwconv{i}.{leaf}", "stages.{s}.{n}.pwconv{i}.linear.{leaf}"),
    ("stages.{s}.{n}.grn.gamma", "stages.{s}.{n}.grn.gamma"),
    ("stages.{s}.{n}.grn.beta", "stages.{s}.{n}.grn.beta"),
)

# Detectron2's stages count from the stem: its res2 is torchvision's layer1.
_DETECTRON2: Rules = (
    ("conv1.weight", "stem.conv1.weight"),
    ("bn1.{leaf}", "stem.conv1.norm.{leaf}"),
) + tuple(
    (f"layer{stage}.{{n}}.{ours}", f"res{stage + 1}.{{n}}.{theirs}")
    for stage in (1, 2, 3, 4)
    for ours, theirs in (
        ("conv{i}.weight", "conv{i}.weight"),
        ("bn{i}.{leaf}", "conv{i}.norm.{leaf}"),
        ("downsample.0.weight", "shortcut.weight"),
        ("downsample.1.{leaf}", "shortcut.norm.{leaf}"),
    )
)

# Vectors and matrices, and the sizes of one before each.
_ONES = {"gamma": 0, "pwconv{i}.weight": 0, "pointwise_conv{i}.weight": 0, "grn.gamma": 3, "grn.beta": 3}
_ONES_OF_FCMAE = {"dwconv.bias": 1, "pwconv{i}.linear.weight": 0, "grn.gamma": 1, "grn.beta": 1}


def _in_blocks(rows: Mapping[str, int], prefix: str = "") -> dict[str, int]:
    return {f"{prefix}stages.{{s}}.{{n}}.{name}": before for name, before in rows.items()}


def _official_model(family: Family, tables: tuple[Rules, ...]) -> Layout:
    return Layout(
        "official",
        family,
        (*tables, (("{rest}", "sparse_encoder.sp_cnn.{rest}"),)),
        spark=_OFFICIAL_SPARK,
        parts=("encoder", "densify", "decoder"),
        ones=_in_blocks(_ONES, "sparse_encoder.sp_cnn."),
        wrapper="module",
        # Buffers that the official model registers and never reads.
        unused={"imn_m": (1, 3, 1, 1), "imn_s": (1, 3, 1, 1), "norm_black": (1, 3, 224, 224)},
    )


def _mmpretrain(family: Family, tables: tuple[Rules, ...]) -> Layout:
    ones = _in_blocks(_ONES | {"grn.gamma": 0, "grn.beta": 0}, "backbone.")
    return Layout("mmpretrain", family, tables, spark=_MMPRETRAIN_SPARK, parts=WHOLE, ones=ones, wrapper="state_dict")


def _fcmae(prefix: str, spark: Rules = (), foreign: tuple[str, ...] = ()) -> Layout:
    """Of the whole model, or its encoder by itself."""
    ones = _in_blocks(_ONES_OF_FCMAE, prefix) | {f"{prefix}downsample_layers.{s}.1.bias": 1 for s in (1, 2, 3)}
    return Layout(
        "fcmae",
        CONVNEXT_V2,
        (_TIMM, _FCMAE, (("{rest}", prefix + "{rest}"),)),
        spark=spark,
        parts=("encoder", "block") if spark else ("encoder",),
        ones=ones | {"decoder.0.grn.gamma": 3, "decoder.0.grn.beta": 3},
        wrapper="model",
        kernels=True,
        foreign=foreign,
    )


DENSE, SPARK_ME = "dense", "spark_me"
OWN = Layout(DENSE, None)
"""The dense network's own names, whatever they are."""
# The official encoder files of ResNets and timm's bear torchvision's names, so all three are read as torchvision.
LAYOUTS: tuple[Layout, ...] = (
    Layout("torchvision", RESNET),
    Layout("timm", RESNET),
    Layout("official", RESNET, parts=("encoder",)),
    Layout("torchvision", None),
    Layout("timm", None),
    Layout("timm", CONVNEXT, (_TORCHVISION, _inverse(_TIMM)), ones={"stages.{s}.blocks.{n}.gamma": 0}),
    # The official encoder files bear the names of the original ConvNeXt, whose classifiers are read here too.
    Layout("official", CONVNEXT, (_TORCHVISION,), ones=_in_blocks(_ONES)),
    Layout("official", CONVNEXT_V2, (_TIMM,), ones=_in_blocks(_ONES)),
    _official_model(RESNET, ()),
    _official_model(CONVNEXT, (_TORCHVISION,)),
    _official_model(CONVNEXT_V2, (_TIMM,)),
    _mmpretrain(RESNET, ((("fc.{leaf}", "head.fc.{leaf}"), ("{rest}", "backbone.{rest}")),)),
    _mmpretrain(CONVNEXT, (_TORCHVISION, _MMPRETRAIN)),
    _mmpretrain(CONVNEXT_V2, (_TIMM, _MMPRETRAIN)),
    Layout(
        "detectron2",
        RESNET,
        (_DETECTRON2,),
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
    _fcmae("encoder.", _FCMAE_SPARK),
    _fcmae("encoder.", foreign=("proj.", "mask_token", "decoder.", "pred.")),  # of another depth than published
    _fcmae(""),
    OWN,
    Layout(
        SPARK_ME,
        None,
        ((("{rest}", "encoder.{rest}"),),),
        head=((("{rest}", "head.{rest}"),),),
        spark=tuple((f"{part}{{rest}}", f"{part}{{rest}}") for part in SPARK),
        parts=(*WHOLE, "block"),
        wrapper="model",
        version=2,
    ),
)


def layout_names(encoder: str | None = None) -> list[str]:
    """Names that `--to` and `export_weights` accept; with an encoder, those that can hold it under other names.

    Raises:
        UserError: for an unknown encoder, or one that needs a library that is missing.
    """
    return _names(None if encoder is None else architecture_of(encoder))


def choose_layout(name: str, architecture: Architecture, parts: Collection[str]) -> Layout:
    """The layout to write: of those called `name`, the one that keeps most of `parts`; the first of equals.

    Raises:
        UserError: for an unknown name, or one that cannot hold the encoder.
    """
    if name not in layout_names():
        raise UserError(f"unknown layout {name!r}: choose one of {', '.join(layout_names())}")
    candidates = [layout for layout in LAYOUTS if layout.name == name and layout.holds(architecture)]
    if not candidates:
        raise UserError(f"layout {name!r} has no {architecture.name}: choose one of {', '.join(_names(architecture))}")
    return max(candidates, key=lambda layout: len(set(parts) & set(layout.parts)))


def own_layout(architecture: Architecture) -> Layout:
    """The first that keeps the names of an encoder's dense network."""
    return next(layout for layout in LAYOUTS if layout.is_own and layout.holds(architecture))


def _names(architecture: Architecture | None) -> list[str]:
    held = [layout for layout in LAYOUTS if architecture is None or layout.holds(architecture)]
    if architecture is not None and own_layout(architecture).name != DENSE:
        held = [layout for layout in held if layout.name != DENSE]
    return list(dict.fromkeys(layout.name for layout in held))


def without_ones(shape: Shape) -> Shape:
    """A shape without its sizes of one."""
    return tuple(size for size in shape if size != 1)
