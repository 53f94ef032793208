"""Which input rows lie under the kernel of each output: index tables shared by all layers of a scale.

The tables follow from the pyramid's mask by integer arithmetic on a raster of row numbers; a test proves them equal to
MinkowskiEngine's kernel maps. Offsets are numbered as MinkowskiEngine numbers them: y varies fastest.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spark_me.devices import copy_to
from spark_me.sparse.tables import Reads, around_places, rows_read


class Window(NamedTuple):
    """A convolution's or pooling's geometry."""

    in_stride: int
    """Tensor stride of the input."""
    kernel_size: int
    """k; odd kernels are centred, even ones start at the site."""
    stride: int
    """Steps of the output, in input sites."""
    dilation: int = 1
    """Distance of neighbouring kernel offsets, in input sites."""

    @property
    def before(self) -> int:
        """How far the kernel reaches back from its site, in input sites."""
        return self.dilation * (self.kernel_size // 2) if self.kernel_size % 2 else 0

    @property
    def span(self) -> int:
        """How many input sites the kernel covers along an axis, from the first to the last."""
        return self.dilation * (self.kernel_size - 1) + 1

    @property
    def out_stride(self) -> int:
        """Tensor stride of the output."""
        return self.in_stride * self.stride


class Pairs(NamedTuple):
    """Where one kernel offset finds a neighbour."""

    offset: int
    """Index of the kernel offset, as MinkowskiEngine numbers them."""
    inputs: Tensor
    """int64 [pairs], input rows."""
    outputs: Tensor
    """int64 [pairs], output rows, ascending."""


class Neighbours:
    """Index tables of one pyramid, built on first use. A missing neighbour is numbered N, one past the last row."""

    def __init__(self, visible: Tensor, patch_size: int, device: torch.device | None = None) -> None:
        """
        Args:
            visible: bool [B, fh, fw]; on the CPU, or building waits for its device.
            patch_size: P.
            device: of the tables; that of `visible` when None.
        """
        device = visible.device if device is None else device
        on_host = visible.cpu()
        self.patch_size = patch_size
        self._patches = copy_to(on_host.nonzero(), device)
        # Number of the visible patch at every place of the grid, counted in canonical order.
        self._patch_number = copy_to(on_host.flatten().cumsum(0).sub(1).view(on_host.shape), device)
        self._visible = copy_to(on_host, device)
        self._tables: dict[tuple, Tensor] = {}
        self._pairs: dict[tuple, list[Pairs]] = {}

    def sites(self, stride: int) -> int:
        """N at `stride`."""
        return len(self._patches) * self.side(stride) ** 2

    def side(self, stride: int) -> int:
        """Sites along a patch's side at `stride`."""
        return self.patch_size // stride

    def positions(self, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image, y and x of every site at `stride`, y and x counted in sites: three int64 [N], canonical order."""
        side = self.side(stride)
        within = torch.arange(side, device=self._patches.device)
        image, row, column = (part[:, None, None] for part in self._patches.unbind(1))
        image, y, x = torch.broadcast_tensors(image, row * side + within[:, None], column * side + within)
        return image.flatten(), y.flatten(), x.flatten()

    def of_sites(self, window: Window) -> Tensor:
        """int64 [N_out, K]: the input row under each kernel offset of each output site."""
        key = ("sites", window)
        if key not in self._tables:
            side, device = self.side(window.out_stride), self._patches.device
            offset = torch.arange(window.kernel_size, device=device) * window.dilation
            # position within the patch of output row i under kernel offset j, along one axis: [side, k]
            position = torch.arange(side, device=device)[:, None] * window.stride + offset - window.before
            table = self._rows_at(position.flatten(), window.in_stride)
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

    def counts(self, window: Window) -> Tensor:
        """int64 [N_out, 1]: how many visible sites lie under the kernel of each output."""
        return (self.of_sites(window) < self.sites(window.in_stride)).sum(dim=1, keepdim=True)

    def pairs(self, window: Window) -> list[Pairs]:
        """The present neighbours alone: for each kernel offset that has any, its (input row, output row) pairs.

        An output occurs once at most for an offset, and so does an input: adding to rows by these indices meets no
        collision, which keeps it deterministic on every device.
        """
        if window not in self._pairs:
            table = self.of_sites(window)
            present = table < self.sites(window.in_stride)
            self._pairs[window] = [
                Pairs(offset, table[outputs, offset], outputs)
                for offset in range(table.shape[1])
                if len(outputs := present[:, offset].nonzero().flatten())
            ]
        return self._pairs[window]

    def pairs_to_raster(self, stride: int, kernel_size: int) -> list[Pairs]:
        """As `pairs` of an odd, centred kernel, with outputs at every place of the dense map [B·h·w]."""
        key = ("raster", stride, kernel_size)
        if key not in self._pairs:
            _, grid_rows, grid_columns = self._visible.shape
            side, reach = self.side(stride), kernel_size // 2
            height, width = grid_rows * side, grid_columns * side
            image, y, x = self.positions(stride)
            pairs = []
            for offset in range(kernel_size**2):
                across, down = divmod(offset, kernel_size)
                out_y, out_x = y - (down - reach), x - (across - reach)
                inputs = ((out_y >= 0) & (out_y < height) & (out_x >= 0) & (out_x < width)).nonzero().flatten()
                pairs.append(Pairs(offset, inputs, ((image * height + out_y) * width + out_x)[inputs]))
            self._pairs[key] = pairs
        return self._pairs[key]

    def inputs_of_outputs(self, window: Window) -> Tensor:
        """int32 [K, N_out]: the input row under each kernel offset of each output; N_in where there is none."""
        size, side = window.kernel_size, self.side(window.out_stride)
        reads = Reads(side, size, scale=window.stride, step=window.dilation, first=-window.before, divisor=1)
        return self._read(reads, window.in_stride)

    def outputs_of_inputs(self, window: Window) -> Tensor:
        """int32 [K, N_in], its transpose: the output that has an input under a kernel offset; N_out if none has."""
        size, side = window.kernel_size, self.side(window.in_stride)
        reads = Reads(side, size, scale=1, step=-window.dilation, first=window.before, divisor=window.stride)
        return self._read(reads, window.out_stride)

    def inputs_of_places(self, stride: int, kernel_size: int) -> Tensor:
        """int32 [K, B·h·w]: as `inputs_of_outputs` of an odd, centred kernel, for every place of the dense map."""
        key = ("inputs of places", stride, kernel_size)
        if key not in self._tables:
            side, patches = self.side(stride), self.sites(self.patch_size)
            reads = Reads(side, kernel_size, scale=1, step=1, first=-(kernel_size // 2), divisor=1)
            numbers = torch.where(self._visible, self._patch_number, patches)
            table = rows_read(reads, around_places(numbers, reads.reach(side), patches), side, self.sites(stride))
            table = table.view(-1, *self._visible.shape, side, side).transpose(3, 4)  # K b row y column x
            self._tables[key] = table.reshape(kernel_size**2, -1)
        return self._tables[key]

    def places_of_inputs(self, stride: int, kernel_size: int) -> Tensor:
        """int32 [K, N], its transpose: the place that has a row under a kernel offset; B·h·w outside the map."""
        key = ("places of inputs", stride, kernel_size)
        if key not in self._tables:
            images, height, width = (a * b for a, b in zip(self._visible.shape, (1, *[self.side(stride)] * 2)))
            image, y, x = self.positions(stride)
            offset = torch.arange(kernel_size, device=image.device)[:, None] - kernel_size // 2
            y, x = y - offset, (x - offset)[:, None]  # across down N
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            table = torch.where(inside, (image * height + y) * width + x, images * height * width)
            self._tables[key] = table.int().flatten(0, 1)
        return self._tables[key]

    def _read(self, reads: Reads, stride: int) -> Tensor:
        """The rows of `stride` that the places of the visible patches read."""
        key = ("reads", reads, stride)
        if key not in self._tables:
            side = self.side(stride)
            reach = reads.reach(side)
            around = self.of_tiles(self.patch_size, -reach, 2 * reach + 1)
            self._tables[key] = rows_read(reads, around, side, self.sites(stride))
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
