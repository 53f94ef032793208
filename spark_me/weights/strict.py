"""Strictness: every tensor that is needed is there with its shape, and no other; one line says what is not."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from spark_me.errors import UserError, shown
from spark_me.weights.expected import COUNTER, ENCODER, Architecture, Shape

LISTED = 12
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
COUNTERS = (COUNTER, "n_averaged")
"""How the names of integers end: batches that a norm has seen, and what torch's averaging has taken in."""


class WeightsError(UserError):
    """A checkpoint does not fit. The message lists the first keys, the attributes all of them.

    Attributes:
        missing: names that are needed and not there.
        unexpected: names that are there and not needed.
        mismatched: name → (shape found, shape needed).
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str],
        unexpected: Sequence[str],
        mismatched: Mapping[str, tuple[Shape, Shape]],
    ) -> None:
        super().__init__(message)
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.mismatched = dict(mismatched)

    def __reduce__(self) -> tuple[Any, ...]:
        # Processes that train together exchange their errors.
        return type(self), (str(self), self.missing, self.unexpected, self.mismatched)


def check_tensors(
    found: Mapping[str, Shape],
    needed: Mapping[str, Shape],
    where: str,
    *,
    architecture: Architecture,
    causes: Sequence[str] = (),
    label: Callable[[str], str] = str,
) -> None:
    """Compare what is there with what is needed.

    Args:
        found, needed: canonical name → shape.
        where: the start of the message: the file, and what it should fit.
        architecture: whose names they are.
        causes: what the caller knows to be the cause: it is said in place of the lists.
        label: how a name is written in the message.

    Raises:
        WeightsError: listing missing keys, unexpected keys, and shapes that differ, with the likely cause. Its
            attributes have them all.
    """
    missing = [label(name) for name in needed if name not in found]
    unexpected = [label(name) for name in found if name not in needed]
    mismatched = {name: (found[name], needed[name]) for name in needed if found.get(name, needed[name]) != needed[name]}
    shapes = [f"{shown(label(name))} is {show(a)}, needed is {show(b)}" for name, (a, b) in mismatched.items()]
    problems = [
        f"{len(items)} {what}: {_listed(items, separator)}"
        for what, items, separator in (
            ("missing", [*map(shown, missing)], ", "),
            ("unexpected", [*map(shown, unexpected)], ", "),
            ("of another shape", shapes, "; "),
        )
        if items
    ]
    if problems:
        likely = ", ".join(_shape_causes(mismatched, architecture))
        listed = f"{'; '.join(problems)}" + (f"; likely cause: {likely}" if likely else "")
        message = f"{where}: {', '.join(causes) or listed}"
        labelled = {label(name): shapes for name, shapes in mismatched.items()}
        raise WeightsError(message, missing, unexpected, labelled)


def require_numbers(state: Mapping[str, Tensor], where: str, like: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Refuse tensors that are no weights: counters of norms are integers, all else is real, floating and finite.

    Args:
        state: name → tensor; of those without values (on the meta device) only the type is looked at.
        where: the file, for messages.
        like: tensors by name whose types are right, too.

    Raises:
        UserError: naming the first that is none.
    """
    for name, tensor in state.items():
        counter = name.endswith(COUNTERS) and tensor.dtype in INTEGERS
        same = name in like and like[name].dtype == tensor.dtype
        if not (tensor.dtype in FLOATS or counter or same):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{where}: {shown(name)} is of {kind}, where weights are real numbers: take another file")
        if tensor.dtype in FLOATS and not tensor.is_meta and not tensor.isfinite().all():
            raise UserError(f"{where}: {shown(name)} is not finite: take an earlier checkpoint, or another file")


def show(shape: Shape) -> str:
    """A shape for people: 64×3×7×7."""
    return shown("×".join(map(str, shape))) or "a scalar"


def _shape_causes(mismatched: Mapping[str, tuple[Shape, Shape]], architecture: Architecture) -> list[str]:
    """What differences of shape usually come from, each with what to do."""
    causes = {}
    for name, (found, needed) in mismatched.items():
        part = architecture.part_of(name)
        is_image = name == ENCODER + architecture.image_weight
        if is_image and len(found) == 4:
            causes["channels"] = f"another number of image channels (in_channels={found[1]} would fit)"
        elif is_image or name.startswith("decoder.projection."):
            causes.setdefault("channels", "another number of image channels (in_channels)")
        elif part in ("densify", "decoder"):
            causes["width"] = "another decoder width (decoder_width)"
        elif part == "classifier" and found and needed:
            causes["classes"] = f"a classifier of {found[0]} classes instead of {needed[0]}"
        else:
            causes["blocks"] = "other blocks or widths (a variant such as Wide ResNet, or another encoder)"
    return list(causes.values())


def _listed(items: Sequence[str], separator: str) -> str:
    rest = len(items) - LISTED
    return separator.join(items[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
