"""How checkpoints name their tensors: one table a layout. A new layout, or a new encoder family, is a new table.

A rule pairs a canonical name (see `spark_me.weights.architectures`) with the layout's own; `{leaf}` stands for a
parameter or statistic, `{rest}` for any remainder, every other placeholder for a number. The first that fits counts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from spark_me.errors import UserError
from spark_me.weights.architectures import Shape

Rules = tuple[tuple[str, str], ...]
KERNEL, WEIGHT = ".kernel", ".weight"


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of one family of encoders.

    Attributes:
        name: what `--to` takes.
        family: of encoders, a key of `architectures.FAMILIES`.
        signature: how some key of every such checkpoint starts, and no key of another layout's.
        rules: pairs of (canonical name, name in this layout).
        parts: what a checkpoint may hold; tensors of other parts are left out when writing.
        wrapper: the entry of a .pth file under which its readers expect the state dict; None for a bare one.
        extras: further plain entries that those readers expect in a .pth file.
        unused: tensors that no computation reads; dropped when reading, written as zeros.
        kernels: sparse convolutions keep MinkowskiEngine's `kernel` instead of a dense `weight`.
        version: raised when the names that we write change.
    """

    name: str
    family: str
    signature: str
    rules: Rules
    parts: tuple[str, ...]
    wrapper: str | None = None
    extras: Mapping[str, object] = field(default_factory=dict)
    unused: Mapping[str, Shape] = field(default_factory=dict)
    kernels: bool = False
    version: int = 1

    def to_canonical(self, key: str) -> str:
        """The canonical name of a key of this layout; a key that no rule knows stays as it is."""
        if key.endswith(KERNEL):
            key = key.removesuffix(KERNEL) + WEIGHT
        return _translate(key, tuple((theirs, ours) for ours, theirs in self.rules))

    def from_canonical(self, name: str, *, sparse_convolution: bool = False) -> str:
        """This layout's key for a canonical name."""
        if self.kernels and sparse_convolution:
            name = name.removesuffix(WEIGHT) + KERNEL
        return _translate(name, self.rules)


_TORCHVISION: Rules = (("fc.{leaf}", "fc.{leaf}"), ("encoder.{rest}", "{rest}"))

_OFFICIAL: Rules = (
    ("encoder.{rest}", "sparse_encoder.sp_cnn.{rest}"),
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

_MMPRETRAIN: Rules = (
    ("encoder.{rest}", "backbone.{rest}"),
    ("fc.{leaf}", "head.fc.{leaf}"),
    ("densify.{n}.norm.{leaf}", "enc_dec_norms.{n}.{leaf}"),
    ("densify.{n}.projection.{leaf}", "enc_dec_projectors.{n}.{leaf}"),
    ("densify.{n}.mask_token", "mask_tokens.{n}"),
    ("decoder.blocks.{n}.upsample.{leaf}", "neck.decoder.{n}.upsample.{leaf}"),
    ("decoder.blocks.{n}.conv{i}.{leaf}", "neck.decoder.{n}.conv_blocks.0.conv{i}.{leaf}"),
    ("decoder.blocks.{n}.norm{i}.{leaf}", "neck.decoder.{n}.conv_blocks.0.norm{i}.{leaf}"),
    ("decoder.projection.{leaf}", "neck.proj.{leaf}"),
)

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

# Buffers that the official model registers and never reads.
_OFFICIAL_UNUSED = {"imn_m": (1, 3, 1, 1), "imn_s": (1, 3, 1, 1), "norm_black": (1, 3, 224, 224)}

_ALL = ("encoder", "densify", "decoder", "fc")

# The official encoder files and timm's bear torchvision's names, so all three are read as torchvision.
LAYOUTS: tuple[Layout, ...] = (
    Layout("torchvision", "resnet", "layer1.", _TORCHVISION, parts=("encoder", "fc")),
    Layout("timm", "resnet", "layer1.", _TORCHVISION, parts=("encoder", "fc")),
    Layout("official", "resnet", "layer1.", _TORCHVISION, parts=("encoder",)),
    Layout(
        "official",
        "resnet",
        "sparse_encoder.sp_cnn.layer1.",
        _OFFICIAL,
        parts=("encoder", "densify", "decoder"),
        wrapper="module",
        unused=_OFFICIAL_UNUSED,
    ),
    Layout("mmpretrain", "resnet", "backbone.layer1.", _MMPRETRAIN, parts=_ALL, wrapper="state_dict"),
    Layout(
        "detectron2",
        "resnet",
        "res2.",
        _DETECTRON2,
        parts=("encoder",),
        wrapper="model",
        extras={"__author__": "spark_me", "matching_heuristics": True},
    ),
    Layout("spark_me", "resnet", "encoder.layer1.", (("{rest}", "{rest}"),), parts=_ALL, wrapper="model", kernels=True),
)
# Under which entries files keep their state dict; none of them is the name of a tensor.
WRAPPERS = ("state_dict", "model", "module")


def layout_names() -> list[str]:
    """Names that `--to` and `export_weights` accept."""
    return list(dict.fromkeys(layout.name for layout in LAYOUTS))


def detect_layout(keys: Iterable[str], where: str) -> Layout:
    """The layout that the keys of a state dict follow.

    Raises:
        UserError: if they follow none.
    """
    keys = list(keys)
    for layout in LAYOUTS:
        if any(key.startswith(layout.signature) for key in keys):
            return layout
    shown = ", ".join(keys[:4]) or "none"
    raise UserError(
        f"{where}: its tensors follow no known layout (first keys: {shown}): "
        f"spark_me reads {', '.join(layout_names())} checkpoints of ResNets"
    )


def choose_layout(name: str, family: str, parts: Iterable[str]) -> Layout:
    """The layout to write: of those called `name`, the one that keeps most of `parts`.

    Raises:
        UserError: for an unknown name.
    """
    available = set(parts)
    candidates = [layout for layout in LAYOUTS if layout.name == name and layout.family == family]
    if not candidates:
        raise UserError(f"unknown layout {name!r}: choose one of {', '.join(layout_names())}")
    return max(candidates, key=lambda layout: (len(available & set(layout.parts)), -len(layout.parts)))


def _translate(name: str, rules: Rules) -> str:
    for source, target in rules:
        match = _pattern(source).fullmatch(name)
        if match:
            return target.format(**match.groupdict())
    return name


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
