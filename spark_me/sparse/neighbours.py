"""Which input rows lie under the kernel of each output: index tables shared by all layers of a scale.

The tables follow from the pyramid's mask by integer arithmetic on a raster of row numbers; a test proves them equal to
MinkowskiEngine's kernel maps. Offsets are numbered as MinkowskiEngine numbers them: y varies fastest.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """A convolution's or pooling's geometry."""

    in_stride: int
    """Tensor stride of the input."""
    kernel_size: int
    """k; odd kernels are centred, even ones start at the site."""
    stride: int
    """Steps of the output, in input sites."""

    @property
    def before(self) -> int:
        """How far the kernel reaches back from its site, in input sites."""
        return self.kernel_size // 2 if self.kernel_size % 2 else 0

    @property
    def out_stride(self) -> int:
        """Tensor stride of the output."""
        return self.in_stride * self.stride


class Neighbours:
    """Index tables of one pyramid, built on first use. A missing neighbour is numbered N, one past the last row."""

    def __init__(self, visible: Tensor, patch_size: int) -> None:
        """
        Args:
            visible: bool [B, fh, fw].
            patch_size: P.
        """
        self.patch_size = patch_size
        self._patches = visible.nonzero()
        # Number of the visible patch at every place of the grid, counted in canonical order.
        self._patch_number = visible.flatten().cumsum(0).sub(1).view(visible.shape)
        self._visible = visible
        self._tables: dict[tuple, Tensor] = {}

    def sites(self, stride: int) -> int:
        """N at `stride`."""
        return len(self._patches) * self.side(stride) ** 2

    def side(self, stride: int) -> int:
        """Sites along a patch's side at `stride`."""
        return self.patch_size // stride

    def of_sites(self, window: Window) -> Tensor:
        """int64 [N_out, K]: the input row under each kernel offset of each output site."""
        key = ("sites", window)
        if key not in self._tables:
            side, reach = self.side(window.out_stride), torch.arange(window.kernel_size)
            # position within the patch of output row i under kernel offset j, along one axis: [side, k]
            position = torch.arange(side)[:, None] * window.stride + reach - window.before
            table = self._rows_at(position.flatten().to(self._patches.device), window.in_stride)
            table = table.view(-1, side, window.kernel_size, side, window.kernel_size)  # M y ky x kx
            self._tables[key] = table.permute(0, 1, 3, 4, 2).reshape(-1, window.kernel_size**2)
        return self._tables[key]

    def of_tiles(self, stride: int, first: int, length: int) -> Tensor:
        """int64 [M, length, length]: the rows of `stride` in a square around each visible patch.

        Args:
            stride: tensor stride of the rows.
            first: where the square starts, in sites from the patch's corner (negative: before it).
            length: the square's side in sites.
        """
        key = ("tiles", stride, first, length)
        if key not in self._tables:
            position = torch.arange(first, first + length, device=self._patches.device)
            self._tables[key] = self._rows_at(position, stride)
        return self._tables[key]

    def inverse(self, window: Window) -> Tensor:
        """int64 [N_in, R]: where each input row occurs in the flattened `of_sites` table; N_out·K where it has no more.

        R is the largest number of outputs that share an input: ceil(k / stride)².
        """
        key = ("inverse", window)
        if key not in self._tables:
            out_side = self.side(window.out_stride)
            per_axis = -(-window.kernel_size // window.stride)
            position = torch.arange(self.side(window.in_stride))[:, None] + window.before
            # outputs o and offsets j with o·stride + j = position
            output = position // window.stride - torch.arange(per_axis)
            offset = position - output * window.stride
            valid = offset < window.kernel_size
            device = self._patches.device
            output, offset, valid = (t.flatten().to(device) for t in (output, offset, valid))
            rows = self._rows_at(output, window.out_stride)  # M, (y r), (x r)
            offsets = offset[None, :] * window.kernel_size + offset[:, None]  # ME's numbering: x·k + y
            missing = rows.eq(len(self._patches) * out_side**2) | ~(valid[:, None] & valid[None, :])
            places = rows * window.kernel_size**2 + offsets
            places.masked_fill_(missing, len(self._patches) * out_side**2 * window.kernel_size**2)
            side = self.side(window.in_stride)
            places = places.view(-1, side, per_axis, side, per_axis).permute(0, 1, 3, 2, 4)
            self._tables[key] = places.reshape(-1, per_axis**2)
        return self._tables[key]

    def _rows_at(self, position: Tensor, stride: int) -> Tensor:
        """int64 [M, L, L]: rows at positions [L] (sites from a patch's corner, may lie outside) down × across."""
        side = self.side(stride)
        patch_step = torch.div(position, side, rounding_mode="floor")
        within = position - patch_step * side
        image, row, column = self._patches.unbind(1)
        _, grid_rows, grid_columns = self._visible.shape
        rows, columns = row[:, None] + patch_step, column[:, None] + patch_step  # [M, L]
        inside = ((rows >= 0) & (rows < grid_rows))[:, :, None] & ((columns >= 0) & (columns < grid_columns))[:, None]
        rows, columns = rows.clamp(0, grid_rows - 1)[:, :, None], columns.clamp(0, grid_columns - 1)[:, None]
        image = image[:, None, None]
        present = inside & self._visible[image, rows, columns]
        site = (self._patch_number[image, rows, columns] * side + within[:, None]) * side + within[None, :]
        return torch.where(present, site, self.sites(stride))
