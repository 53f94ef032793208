"""What a layout is: rules that translate the names of tensors, and shapes that differ.

A rule pairs a canonical name (see `spark_me.weights.architectures`) with the layout's own; `{leaf}` stands for a
parameter or statistic, `{rest}` for any remainder, every other placeholder for a number. The first that fits counts.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache

from spark_me.weights.rows import Shape, TensorSpec

Rules = tuple[tuple[str, str], ...]
KERNEL, WEIGHT = ".kernel", ".weight"


@dataclass(frozen=True)
class Ones:
    """A tensor that a layout keeps with further sizes of one.

    Attributes:
        name: canonical name, with placeholders as in a rule.
        before, after: how many ones stand before and after the canonical shape.
        encoders: the layout does so in these alone; in all when None.
    """

    name: str
    before: int = 0
    after: int = 0
    encoders: Collection[str] | None = None


@dataclass(frozen=True)
class Layout:
    """One way to name and shape the tensors of a family of encoders.

    Attributes:
        name: what `--to` takes.
        encoders: which it can hold.
        signature: how some key of every such checkpoint starts.
        rules: pairs of (canonical name, name in this layout).
        parts: what a checkpoint may hold; tensors of other parts are left out when writing.
        ones: tensors of another shape than the canonical one.
        wrapper: the entry of a .pth file under which its readers expect the state dict; None for a bare one.
        extras: further plain entries that those readers expect in a .pth file.
        unused: tensors that no computation reads; dropped when reading, written as zeros.
        sparse: of a sparse model: `kernel` and shapes are MinkowskiEngine's.
        dense: how the canonical names begin that are torch's in it all the same.
        foreign: how the keys begin of a decoder that has no counterpart here; dropped with a note.
        hints: what the readers of such a file need to be told; notes of a conversion.
        pickled: whether they also take a .pkl file of numpy arrays.
        version: raised when the names that we write change.
    """

    name: str
    encoders: Collection[str]
    signature: str
    rules: Rules
    parts: tuple[str, ...]
    ones: tuple[Ones, ...] = ()
    wrapper: str | None = None
    extras: Mapping[str, object] = field(default_factory=dict)
    unused: Mapping[str, Shape] = field(default_factory=dict)
    sparse: bool = False
    dense: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    pickled: bool = False
    version: int = 1

    def to_canonical(self, key: str) -> str:
        """The canonical name of a key of this layout; for a key that no rule knows, a name that no model has."""
        if self.sparse and key.endswith(KERNEL):
            key = key.removesuffix(KERNEL) + WEIGHT
        return _translate(key, tuple((theirs, ours) for ours, theirs in self.rules)) or f"unknown:{key}"

    def from_canonical(self, name: str, spec: TensorSpec | None = None) -> str:
        """This layout's key for a canonical name; `spec` is None for a tensor that no model has."""
        if spec is not None and self.is_kernel(name, spec):
            name = name.removesuffix(WEIGHT) + KERNEL
        return _translate(name, self.rules) or name

    def shape(self, name: str, spec: TensorSpec, encoder: str) -> Shape:
        """The shape in which this layout keeps a tensor of an encoder's model."""
        for row in self.ones:
            if (row.encoders is None or encoder in row.encoders) and _pattern(row.name).fullmatch(name):
                return (1,) * row.before + spec.shape + (1,) * row.after
        return spec.sparse_shape or spec.shape if self._is_sparse(name) else spec.shape

    def is_kernel(self, name: str, spec: TensorSpec) -> bool:
        """Whether this layout keeps a tensor, by its canonical name, as MinkowskiEngine's kernel."""
        return spec.kernel and self._is_sparse(name)

    def _is_sparse(self, name: str) -> bool:
        return self.sparse and not name.startswith(self.dense)


ALL_PARTS = ("encoder", "densify", "decoder", "norm", "fc")

OFFICIAL_DECODER: Rules = (
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
# Buffers that the official model registers and never reads.
OFFICIAL_UNUSED = {"imn_m": (1, 3, 1, 1), "imn_s": (1, 3, 1, 1), "norm_black": (1, 3, 224, 224)}

MMPRETRAIN_DECODER: Rules = (
    ("densify.{n}.norm.{leaf}", "enc_dec_norms.{n}.{leaf}"),
    ("densify.{n}.projection.{leaf}", "enc_dec_projectors.{n}.{leaf}"),
    ("densify.{n}.mask_token", "mask_tokens.{n}"),
    ("decoder.blocks.{n}.upsample.{leaf}", "neck.decoder.{n}.upsample.{leaf}"),
    ("decoder.blocks.{n}.conv{i}.{leaf}", "neck.decoder.{n}.conv_blocks.0.conv{i}.{leaf}"),
    ("decoder.blocks.{n}.norm{i}.{leaf}", "neck.decoder.{n}.conv_blocks.0.norm{i}.{leaf}"),
    ("decoder.projection.{leaf}", "neck.proj.{leaf}"),
)


def _translate(name: str, rules: Rules) -> str | None:
    for source, target in rules:
        match = _pattern(source).fullmatch(name)
        if match:
            return target.format(**match.groupdict())
    return None


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
