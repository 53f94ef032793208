"""The known layouts of checkpoints: which one a file follows, and which one to write."""

from collections.abc import Collection, Iterable

from spark_me.errors import UserError, shown
from spark_me.weights.convnext_tables import CONVNEXT_LAYOUTS
from spark_me.weights.layout_rules import Layout
from spark_me.weights.resnet_tables import RESNET_LAYOUTS

LAYOUTS: tuple[Layout, ...] = RESNET_LAYOUTS + CONVNEXT_LAYOUTS
# Under which entries files keep their state dict; none of them is the name of a tensor.
WRAPPERS = ("state_dict", "model", "module")


def layout_names(encoder: str | None = None) -> list[str]:
    """Names that `--to` and `export_weights` accept; with an encoder, those that can hold it."""
    return list(dict.fromkeys(layout.name for layout in LAYOUTS if encoder is None or encoder in layout.encoders))


def detect_layout(keys: Iterable[str], where: str) -> Layout:
    """The layout that the keys of a state dict follow.

    Raises:
        UserError: if they follow none.
    """
    keys = list(keys)
    # A sparse encoder by itself has the names of a dense one but for its kernels, so these are looked for first.
    for layout in sorted(LAYOUTS, key=lambda layout: not layout.sparse):
        if any(key.startswith(layout.signature) for key in keys):
            return layout
    first = ", ".join(map(shown, keys[:4])) or "none"
    raise UserError(
        f"{where}: its tensors follow no known layout (first keys: {first}): "
        f"spark_me reads {', '.join(layout_names())} checkpoints of ResNets and ConvNeXts"
    )


def choose_layout(name: str, encoder: str, parts: Collection[str]) -> Layout:
    """The layout to write: of those called `name`, the one that keeps most of `parts`; the first of equals.

    Raises:
        UserError: for an unknown name, or one that cannot hold the encoder.
    """
    if name not in layout_names():
        raise UserError(f"unknown layout {name!r}: choose one of {', '.join(layout_names())}")
    candidates = [layout for layout in LAYOUTS if layout.name == name and encoder in layout.encoders]
    if not candidates:
        raise UserError(f"layout {name!r} has no {encoder}: choose one of {', '.join(layout_names(encoder))}")
    return max(candidates, key=lambda layout: len(set(parts) & set(layout.parts)))
