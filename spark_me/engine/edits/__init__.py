"""Every change that spark_me makes to MinkowskiEngine's source, and why."""

from collections.abc import Sequence

from spark_me.engine.edits.common import COMMON_EDITS, FAULT_EDITS
from spark_me.engine.edits.cuda import CUDA_EDITS
from spark_me.engine.edits.edit import Edit, apply_edits, digest
from spark_me.engine.target import Target

__all__ = ["EDITS", "Edit", "apply_edits", "digest", "edits_for"]

EDITS: tuple[Edit, ...] = COMMON_EDITS + FAULT_EDITS + CUDA_EDITS


def edits_for(target: Target, edits: Sequence[Edit] = EDITS) -> tuple[Edit, ...]:
    """The edits that this target needs, in order."""
    return tuple(edit for edit in edits if edit.applies(target))
