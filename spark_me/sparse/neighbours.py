"""Which input rows lie under the kernel of each output: index tables, and tiles, shared by all layers of a scale."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from spark_me.devices import copy_to


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


MIN_TILE_SIDE = 8
"""Sites along a patch's side from which tiles are faster than gathering neighbours (docs/benchmarks.md)."""
Pair = tuple[int, int]
"""(down, across)."""


class Window(NamedTuple):
    """A convolution's or pooling's geometry.

    The output at position p of its stride reads the inputs at p·stride − before + dilation·k, for k = 0 … size − 1.
    """

    in_stride: int
    """Tensor stride of the input."""
    size: Pair
    """Kernel offsets along each axis."""
    stride: int
    """Steps of the output, in input sites."""
    dilation: Pair
    """Distance of neighbouring kernel offsets, in input sites."""
    before: Pair
    """How far the kernel reaches back from its site, in input sites."""

    @property
    def volume(self) -> int:
        """K, the number of kernel offsets."""
        return self.size[0] * self.size[1]

    @property
    def span(self) -> Pair:
        """How many input sites the kernel covers along each axis, from the first to the last."""
        down, across = (step * (size - 1) + 1 for step, size in zip(self.dilation, self.size))
        return down, across

    @property
    def out_stride(self) -> int:
        """Tensor stride of the output."""
        return self.in_stride * self.stride

    @property
    def in_engine(self) -> "Window":
        """The same, where MinkowskiEngine lays it: odd kernels are centred, even ones start at the site."""
        down, across = (step * (size // 2) if size % 2 else 0 for step, size in zip(self.dilation, self.size))
        return self._replace(before=(down, across))


class Pairs(NamedTuple):
    """Where one kernel offset finds a neighbour."""

    offset: Pair
    """The kernel offset."""
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
            # position within the patch of output row i under kernel offset j, along each axis: [side, k]
            down, across = (
                torch.arange(side, device=device)[:, None] * window.stride
                + torch.arange(size, device=device) * dilation
                - before
                for size, dilation, before in zip(window.size, window.dilation, window.before)
            )
            table = self._rows_at(down.flatten(), across.flatten(), window.in_stride)
            table = table.view(-1, side, window.size[0], side, window.size[1])  # M y ky x kx
            self._tables[key] = table.permute(0, 1, 3, 4, 2).reshape(-1, window.volume)
        return self._tables[key]

    def of_tiles(self, stride: int, first: Pair, length: Pair) -> Tensor:
        """int64 [M, length[0], length[1]]: the rows of `stride` in a rectangle around each visible patch.

        Args:
            stride: tensor stride of the rows.
            first: where the rectangle starts, in sites from the patch's corner (negative: before it).
            length: the rectangle's sides in sites.
        """
        key = ("tiles", stride, first, length)
        if key not in self._tables:
            device = self._patches.device
            down, across = (torch.arange(start, start + count, device=device) for start, count in zip(first, length))
            self._tables[key] = self._rows_at(down, across, stride)
        return self._tables[key]

    def outside_of_map(self, stride: int, first: Pair, length: Pair) -> Tensor:
        """bool [M, length[0], length[1]]: which places of the rectangles of `of_tiles` lie beyond the map."""
        side = self.side(stride)
        _, *corners = self._patches.unbind(1)
        down, across = (
            (position < 0) | (position >= patches * side)
            for position, patches in zip(
                (
                    corner[:, None] * side + torch.arange(start, start + count, device=corner.device)
                    for corner, start, count in zip(corners, first, length)
                ),
                self._visible.shape[1:],
            )
        )
        return down[:, :, None] | across[:, None, :]

    def mirrored(self, window: Window) -> Tensor:
        """As `of_sites`, with the sites inside the map, mirrored at its edge, in the place of those outside."""
        side, (_, *grid) = self.side(window.in_stride), self._visible.shape
        # |p|, then as far before the last site as it was behind
        y, x = (
            torch.minimum(place.abs(), 2 * (patches * side - 1) - place.abs())
            for place, patches in zip(self._places(window), grid)
        )
        image = self.positions(window.out_stride)[0][:, None, None]
        visible = self._visible[image, y // side, x // side]
        row = (self._patch_number[image, y // side, x // side] * side + y % side) * side + x % side
        return torch.where(visible, row, self.sites(window.in_stride)).flatten(1)

    def outside(self, window: Window) -> Tensor:
        """bool [N_out, K]: whether the place under each kernel offset of each output lies beyond the map."""
        side, (_, *grid) = self.side(window.in_stride), self._visible.shape
        down, across = ((place < 0) | (place >= patches * side) for place, patches in zip(self._places(window), grid))
        return (down | across).flatten(1)

    def _places(self, window: Window) -> tuple[Tensor, Tensor]:
        """y [N_out, 1, kh] and x [N_out, kw, 1] of what lies under the kernel, in sites of the whole map."""
        _, *positions = self.positions(window.out_stride)
        y, x = (
            position[:, None] * window.stride + torch.arange(size, device=position.device) * step - before
            for position, size, step, before in zip(positions, window.size, window.dilation, window.before)
        )
        return y[:, None, :], x[:, :, None]

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
                Pairs((offset % window.size[0], offset // window.size[0]), table[outputs, offset], outputs)
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
                pairs.append(Pairs((down, across), inputs, ((image * height + out_y) * width + out_x)[inputs]))
            self._pairs[key] = pairs
        return self._pairs[key]

    def inputs_of_outputs(self, window: Window) -> Tensor:
        """int32 [K, N_out]: the input row under each kernel offset of each output; N_in where there is none."""
        side = self.side(window.out_stride)
        down, across = (
            Reads(side, size, scale=window.stride, step=dilation, first=-before, divisor=1)
            for size, dilation, before in zip(window.size, window.dilation, window.before)
        )
        return self._read((down, across), window.in_stride)

    def outputs_of_inputs(self, window: Window) -> Tensor:
        """int32 [K, N_in], its transpose: the output that has an input under a kernel offset; N_out if none has."""
        side = self.side(window.in_stride)
        down, across = (
            Reads(side, size, scale=1, step=-dilation, first=before, divisor=window.stride)
            for size, dilation, before in zip(window.size, window.dilation, window.before)
        )
        return self._read((down, across), window.out_stride)

    def inputs_of_places(self, stride: int, kernel_size: int) -> Tensor:
        """int32 [K, B·h·w]: as `inputs_of_outputs` of an odd, centred kernel, for every place of the dense map."""
        key = ("inputs of places", stride, kernel_size)
        if key not in self._tables:
            side, patches = self.side(stride), self.sites(self.patch_size)
            reads = Reads(side, kernel_size, scale=1, step=1, first=-(kernel_size // 2), divisor=1)
            numbers = torch.where(self._visible, self._patch_number, patches)
            around = around_places(numbers, reads.reach(side), patches)
            table = rows_read((reads, reads), around, side, self.sites(stride))
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

    def _read(self, reads: tuple[Reads, Reads], stride: int) -> Tensor:
        """The rows of `stride` that the places of the visible patches read, down and across."""
        key = ("reads", reads, stride)
        if key not in self._tables:
            side = self.side(stride)
            reach = max(axis.reach(side) for axis in reads)
            around = self.of_tiles(self.patch_size, (-reach, -reach), (2 * reach + 1, 2 * reach + 1))
            self._tables[key] = rows_read(reads, around, side, self.sites(stride))
        return self._tables[key]

    def _rows_at(self, down: Tensor, across: Tensor, stride: int) -> Tensor:
        """int64 [M, h, w]: rows at positions down [h] × across [w], in sites from a patch's corner, may lie outside."""
        side = self.side(stride)
        row_step, column_step = (torch.div(axis, side, rounding_mode="floor") for axis in (down, across))
        within_y, within_x = down - row_step * side, across - column_step * side
        image, row, column = self._patches.unbind(1)
        _, grid_rows, grid_columns = self._visible.shape
        rows, columns = row[:, None] + row_step, column[:, None] + column_step  # M h, M w
        inside = ((rows >= 0) & (rows < grid_rows))[:, :, None] & ((columns >= 0) & (columns < grid_columns))[:, None]
        rows, columns = rows.clamp(0, grid_rows - 1)[:, :, None], columns.clamp(0, grid_columns - 1)[:, None]
        image = image[:, None, None]
        present = inside & self._visible[image, rows, columns]
        site = (self._patch_number[image, rows, columns] * side + within_y[:, None]) * side + within_x[None, :]
        return torch.where(present, site, self.sites(stride))


def _gather(rows: Tensor, table: Tensor, empty: float = 0.0) -> Tensor:
    """rows [N, C] and table [M, K] → [M, K·C]; `empty` where the table says N."""
    padded = functional.pad(rows, (0, 0, 0, 1), value=empty)
    return padded.index_select(0, table.flatten()).view(table.shape[0], -1)


def tiles_of(rows: Tensor, window: Window, neighbours: Neighbours, empty: float) -> Tensor:
    """Every visible patch with the halo that the window needs: [M, C, h, w], channels last in memory."""
    (top, left), length = window.before, tile_shape(window, neighbours)
    table = neighbours.of_tiles(window.in_stride, (-top, -left), length)
    tiles = _gather(rows, table.flatten(1), empty)
    return tiles.view(-1, *length, rows.shape[1]).permute(0, 3, 1, 2)


def tile_shape(window: Window, neighbours: Neighbours) -> Pair:
    """(h, w) of a tile."""
    steps = (neighbours.side(window.out_stride) - 1) * window.stride
    height, width = window.span
    return steps + height, steps + width


def fold(tiles: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Adjoint of `tiles_of`: add every tile's halo to the patch that it came from, [M, C, h, w] → [N, C]."""
    side, (top, left) = neighbours.side(window.in_stride), window.before
    height, width = tiles.shape[2:]
    images = tiles.permute(0, 2, 3, 1)
    # the patch itself; a kernel that is shorter than its stride, or starts behind its site, leaves some of it out
    own_y, tile_y = _overlap(-top, height, side)
    own_x, tile_x = _overlap(-left, width, side)
    if own_y == own_x == slice(0, side):
        folded = images[:, tile_y, tile_x].contiguous()
    else:
        folded = images.new_zeros(len(images), side, side, images.shape[3])
        folded[:, own_y, own_x] = images[:, tile_y, tile_x]
    # patches that the halo reaches over
    reach = max(-(-max(start, length - start - side, 0) // side) for start, length in ((top, height), (left, width)))
    steps = range(-reach, reach + 1)
    around = neighbours.of_tiles(neighbours.patch_size, (-reach, -reach), (len(steps), len(steps)))
    for down, across in itertools.product(steps, steps):
        # the tile of the patch `down`, `across` of mine starts here in my coordinates
        mine_y, theirs_y = _overlap(down * side - top, height, side)
        mine_x, theirs_x = _overlap(across * side - left, width, side)
        if (down or across) and mine_y.start < mine_y.stop and mine_x.start < mine_x.stop:
            halo = functional.pad(images[:, theirs_y, theirs_x], (0, 0, 0, 0, 0, 0, 0, 1))
            folded[:, mine_y, mine_x] += halo.index_select(0, around[:, reach + down, reach + across])
    return folded.view(-1, tiles.shape[1])


def _overlap(start: int, length: int, side: int) -> tuple[slice, slice]:
    """Where [start, start + length) overlaps [0, side), in the coordinates of the latter and of the former."""
    first, last = max(0, start), min(side, start + length)
    return slice(first, last), slice(first - start, last - start)


def every(rows: Tensor, step: int, side: int) -> Tensor:
    """The first of every step × step sites: rows of patches of `side`² sites → of (side / step)² sites."""
    blocks = rows.reshape(-1, side // step, step, side // step, step, rows.shape[1])
    return blocks[:, :, 0, :, 0].flatten(0, 2)


def rows_of(images: Tensor) -> Tensor:
    """[M, C, side, side] → rows [M·side², C]."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def images_of(rows: Tensor, side: int) -> Tensor:
    """Rows [M·side², C] → [M, C, side, side], channels last in memory."""
    return rows.reshape(-1, side, side, rows.shape[1]).permute(0, 3, 1, 2)
