"""Neighbour tables for kernels that read them on a GPU: int32 [K, places], by integer arithmetic on patch numbers.

No shape depends on the mask's values, and nothing is read back from the device: building a table never waits for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Reads(NamedTuple):
    """What the places of a patch read along one axis, down as across.

    Place p reads, under kernel offset k, the position (scale·p + step·k + first) / divisor, in sites from the patch's
    corner. It may lie in another patch; where the division leaves a rest, nothing is read.
    """

    places: int
    """Places p along a patch's side."""
    offsets: int
    """Kernel offsets k along an axis."""
    scale: int
    step: int
    first: int
    divisor: int

    def reach(self, side: int) -> int:
        """How many patches of `side` sites away the positions lie at most."""
        last = self.step * (self.offsets - 1)
        lowest = (self.first + min(0, last)) // self.divisor
        highest = (self.first + max(0, last) + self.scale * (self.places - 1)) // self.divisor
        return max(-(lowest // side), highest // side)


def rows_read(reads: tuple[Reads, Reads], around: Tensor, side: int, missing: int) -> Tensor:
    """The row that every place reads under every kernel offset, numbered as MinkowskiEngine does (y varies fastest).

    Args:
        reads: along each axis, (down, across), of as many places.
        around: [patches, w, w], the numbers of the visible patches around each patch, w = 2·reach + 1; where there is
            none, one past the last.
        side: sites along a patch's side of what is read.
        missing: N, the number of rows, for places that read nothing.

    Returns:
        int32 [K, patches · places²], places patch by patch and row-major within a patch.
    """
    patches, width = around.shape[:2]
    (exact_y, patch_y, within_y), (exact_x, patch_x, within_x) = (
        _cells(axis, side, width, around.device) for axis in reads
    )
    # x varies slowest among the offsets and fastest among the places: kx ky y x
    cell = (within_y[:, :, None] * side + within_x[:, None, None, :]).flatten(2).flatten(0, 1)
    index = (patch_y[:, :, None] * width + patch_x[:, None, None, :]).flatten(2).flatten(0, 1)
    exact = (exact_y[:, :, None] & exact_x[:, None, None, :]).flatten(2).flatten(0, 1)
    numbers = functional.pad(around.flatten(1).int(), (0, 1), value=missing // side**2)
    index = torch.where(exact, index, width**2)
    rows = numbers[torch.arange(patches, device=around.device)[:, None], index[:, None]]  # K patch place
    return rows.mul_(side**2).add_(cell[:, None].int()).clamp_(max=missing).flatten(1)


def _cells(reads: Reads, side: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, [offsets, places]: whether anything is read, from which patch around, and where in that."""
    place, offset = (torch.arange(count, device=device) for count in (reads.places, reads.offsets))
    position = reads.scale * place + reads.step * offset[:, None] + reads.first
    exact, position = position % reads.divisor == 0, position // reads.divisor
    patch = position // side
    return exact, patch + width // 2, position - patch * side


def around_places(numbers: Tensor, reach: int, missing: int) -> Tensor:
    """The numbers around every place of a grid: [B, fh, fw] → [B·fh·fw, w, w], w = 2·reach + 1.

    Args:
        numbers: of the visible patches; `missing` where a patch is hidden.
        reach: how far around.
        missing: for places beyond the grid.
    """
    width = 2 * reach + 1
    padded = functional.pad(numbers, [reach] * 4, value=missing)
    return padded.unfold(1, width, 1).unfold(2, width, 1).reshape(-1, width, width)
