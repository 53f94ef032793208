"""Which input rows lie under the kernel of each output: index tables, and tiles, shared by all layers of a scale."""

import itertools
from collections.abc import Callable, Iterator
from functools import wraps
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from spark_me.devices import copy_to

Method = TypeVar("Method", bound=Callable[..., Any])


class Reads(NamedTuple):
    """What the places of a patch read along one axis, down as across.

    Place p reads, under kernel offset k, the position (scale·p + step·k + first) / divisor, in sites from the patch's
    corner. It may lie in another patch; where the division leaves a rest, nothing is read.
    """

    places: int
    """Places p along a patch's side."""
    offsets: int
    """Kernel offsets k along an axis."""
    first: int
    scale: int = 1
    step: int = 1
    divisor: int = 1

    def reach(self, side: int) -> int:
        """How many patches of `side` sites away the positions lie at most."""
        last = self.step * (self.offsets - 1)
        lowest = (self.first + min(0, last)) // self.divisor
        highest = (self.first + max(0, last) + self.scale * (self.places - 1)) // self.divisor
        return max(-(lowest // side), highest // side)


def rows_read(reads: tuple[Reads, Reads], around: Tensor, side: int, missing: int) -> Tensor:
    """The row that every place reads under every kernel offset, numbered as MinkowskiEngine does (y varies fastest).

    Args:
        reads: along each axis, (down, across).
        around: int32 [patches, w, w], the numbers of the patches around each patch; where there is none, one past the
            last.
        side: sites along a patch's side of what is read.
        missing: N, the number of rows, for places that read nothing.

    Returns:
        int32 [K, patches · places], places patch by patch and row-major within a patch.
    """
    patches, width = around.shape[:2]
    (exact_y, patch_y, within_y), (exact_x, patch_x, within_x) = (
        _cells(axis, side, width, around.device) for axis in reads
    )
    # x varies slowest among the offsets and fastest among the places: kx ky y x
    cell = (within_y[:, :, None] * side + within_x[:, None, None, :]).flatten(2).flatten(0, 1)
    index = (patch_y[:, :, None] * width + patch_x[:, None, None, :]).flatten(2).flatten(0, 1)
    exact = (exact_y[:, :, None] & exact_x[:, None, None, :]).flatten(2).flatten(0, 1)
    numbers = functional.pad(around.flatten(1), (0, 1), value=missing // side**2)
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
    """The numbers around every place of a grid: [B, fh, fw] → a view [B, fh, fw, w, w], w = 2·reach + 1.

    Args:
        numbers: of the patches.
        reach: how far around.
        missing: for places beyond the grid.
    """
    width = 2 * reach + 1
    padded = functional.pad(numbers, [reach] * 4, value=missing)
    return padded.unfold(1, width, 1).unfold(2, width, 1)


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
    def axes(self) -> Iterator[tuple[int, int, int]]:
        """(size, dilation, before) down, then across."""
        return zip(self.size, self.dilation, self.before)

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


def _once(build: Method) -> Method:
    """Keep what a method of `Neighbours` returned for the same arguments."""

    @wraps(build)
    def built(self: "Neighbours", *arguments: Any) -> Any:
        key = (build.__name__, *arguments)
        if key not in self._built:
            self._built[key] = build(self, *arguments)
        return self._built[key]

    return cast(Method, built)


class VisiblePatches(NamedTuple):
    """Which patches of a batch are visible, in the forms that tables are made of; all that is copied to a device."""

    visible: Tensor
    """bool [B, fh, fw]"""
    places: Tensor
    """int64 [M, 3], image, row and column of each visible patch, in canonical order."""
    numbers: Tensor
    """int32 [B, fh, fw], the number of the visible patch at every place of the grid; M where it is hidden."""

    @classmethod
    def of(cls, visible: Tensor, device: torch.device | str | None = None) -> "VisiblePatches":
        """Find them.

        Args:
            visible: bool [B, fh, fw], True = kept; of one image at least, each with one visible patch at least. Best
                on the CPU, whatever `device` is: from a GPU it is read back, which waits for all work there.
            device: where they are to be; that of `visible` when None.

        Raises:
            ValueError: for another shape or dtype, no image, or an image without a visible patch.
        """
        if visible.dtype != torch.bool or visible.dim() != 3:
            raise ValueError(f"visible must be bool [B, fh, fw], not {visible.dtype} {tuple(visible.shape)}")
        device = visible.device if device is None else torch.device(device)
        visible = visible.cpu()
        # Means and losses over nothing are no numbers, and not every kernel of a backend can do without a site.
        if not len(visible):
            raise ValueError("a batch needs at least one image")
        if not visible.flatten(1).any(dim=1).all():
            raise ValueError("every image needs at least one visible patch")
        places = visible.nonzero()
        numbers = visible.flatten().cumsum(0, dtype=torch.int32).sub_(1).view(visible.shape)
        numbers.masked_fill_(~visible, len(places))
        return cls(*(copy_to(part, device) for part in (visible, places, numbers)))


class Neighbours:
    """Index tables of one pyramid, built on first use. A missing neighbour is numbered N, one past the last row."""

    def __init__(self, patches: VisiblePatches, patch_size: int) -> None:
        self.patch_size = patch_size
        self._patches, self._numbers = patches.places, patches.numbers
        self._built: dict[tuple, Any] = {}

    def sites(self, stride: int) -> int:
        """N at `stride`."""
        return len(self._patches) * self.side(stride) ** 2

    def side(self, stride: int) -> int:
        """Sites along a patch's side at `stride`."""
        return self.patch_size // stride

    def extent(self, stride: int) -> tuple[int, int, int]:
        """(B, H/s, W/s): the dense shape that the sites of `stride` lie in."""
        images, rows, columns = self._numbers.shape
        return images, rows * self.side(stride), columns * self.side(stride)

    def positions(self, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image, y and x of every site at `stride`, y and x counted in sites: three int64 [N], canonical order."""
        side = self.side(stride)
        within = torch.arange(side, device=self._patches.device)
        image, row, column = (part[:, None, None] for part in self._patches.unbind(1))
        image, y, x = torch.broadcast_tensors(image, row * side + within[:, None], column * side + within)
        return image.flatten(), y.flatten(), x.flatten()

    @_once
    def inputs_of_outputs(self, window: Window) -> Tensor:
        """int32 [K, N_out]: the input row under each kernel offset of each output; N_in where there is none."""
        return self._read(self._inputs(window), window.in_stride)

    @_once
    def outputs_of_inputs(self, window: Window) -> Tensor:
        """int32 [K, N_in], its transpose: the output that has an input under a kernel offset; N_out if none has."""
        side = self.side(window.in_stride)
        down, across = (
            Reads(side, size, first=before, step=-dilation, divisor=window.stride)
            for size, dilation, before in window.axes
        )
        return self._read((down, across), window.out_stride)

    @_once
    def inputs_of_places(self, stride: int, kernel_size: int) -> Tensor:
        """int32 [K, B·h·w]: as `inputs_of_outputs` of an odd, centred kernel, for every place of the dense map."""
        side, patches = self.side(stride), len(self._patches)
        reads = Reads(side, kernel_size, first=-(kernel_size // 2))
        around = around_places(self._numbers, reads.reach(side), patches)
        table = rows_read((reads, reads), around.flatten(0, 2), side, self.sites(stride))
        table = table.view(-1, *self._numbers.shape, side, side).transpose(3, 4)  # K b row y column x
        return table.reshape(kernel_size**2, -1)

    @_once
    def places_of_inputs(self, stride: int, kernel_size: int) -> Tensor:
        """int32 [K, N], its transpose: the place that has a row under a kernel offset; B·h·w outside the map."""
        images, height, width = self.extent(stride)
        image, y, x = self.positions(stride)
        offset = torch.arange(kernel_size, device=image.device)[:, None] - kernel_size // 2
        y, x = y - offset, (x - offset)[:, None]  # across down N
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        table = torch.where(inside, (image * height + y) * width + x, images * height * width)
        return table.int().flatten(0, 1)

    @_once
    def around(self, reach: int) -> Tensor:
        """int32 [M, w, w], w = 2·reach + 1: the numbers of the visible patches around each; M where there is none."""
        return self._at_patches(around_places(self._numbers, reach, len(self._patches)))

    @_once
    def tiles(self, stride: int, first: Pair, length: Pair) -> Tensor:
        """int32 [M, length[0], length[1]]: the rows of `stride` in a rectangle around each visible patch.

        Args:
            stride: tensor stride of the rows.
            first: where the rectangle starts, in sites from the patch's corner (negative: before it).
            length: the rectangle's sides in sites.
        """
        return self._read(_rectangle(first, length), stride).view(-1, *length)

    def outside_of_tiles(self, stride: int, first: Pair, length: Pair) -> Tensor:
        """bool [M, length[0], length[1]]: which places of the rectangles of `tiles` lie beyond the map."""
        return self._outside(_rectangle(first, length), stride).view(-1, *length)

    def outside(self, window: Window) -> Tensor:
        """bool [K, N_out]: whether the place under each kernel offset of each output lies beyond the map."""
        return self._outside(self._inputs(window), window.in_stride)

    def mirrored(self, window: Window) -> Tensor:
        """int64 [K, N_out]: as `inputs_of_outputs`, but beyond the map's edge the sites inside are mirrored."""
        side, (_, *lengths) = self.side(window.in_stride), self.extent(window.in_stride)
        image, *positions = self.positions(window.out_stride)
        places = []
        for position, length, (size, dilation, before) in zip(positions, lengths, window.axes):
            offset = torch.arange(size, device=image.device)[:, None]
            place = (position * window.stride + offset * dilation - before).abs()
            places.append(torch.minimum(place, 2 * (length - 1) - place))  # as far before the last as it was behind
        y, x = places[0], places[1][:, None]  # across down N
        rows = (self._numbers[image, y // side, x // side] * side + y % side) * side + x % side
        return rows.clamp(max=self.sites(window.in_stride)).flatten(0, 1)

    def counts(self, window: Window) -> Tensor:
        """int64 [N_out, 1]: how many visible sites lie under the kernel of each output."""
        return (self.inputs_of_outputs(window) < self.sites(window.in_stride)).sum(dim=0)[:, None]

    @_once
    def pairs(self, window: Window) -> list[Pairs]:
        """The present neighbours alone: for each kernel offset that has any, its (input row, output row) pairs.

        An output occurs once at most for an offset, and so does an input: adding to rows by these indices meets no
        collision, which keeps it deterministic on every device.
        """
        present = _present(self.inputs_of_outputs(window), self.sites(window.in_stride), window.size[0])
        return [Pairs(offset, inputs, outputs) for offset, outputs, inputs in present]

    @_once
    def pairs_to_raster(self, stride: int, kernel_size: int) -> list[Pairs]:
        """As `pairs` of an odd, centred kernel, with outputs at every place of the dense map [B·h·w]."""
        table = self.places_of_inputs(stride, kernel_size)
        return [Pairs(*each) for each in _present(table, prod(self.extent(stride)), kernel_size)]

    def _inputs(self, window: Window) -> tuple[Reads, Reads]:
        """What the outputs of a visible patch read."""
        side = self.side(window.out_stride)
        down, across = (
            Reads(side, size, first=-before, scale=window.stride, step=dilation)
            for size, dilation, before in window.axes
        )
        return down, across

    def _read(self, reads: tuple[Reads, Reads], stride: int) -> Tensor:
        """int32 [K, M · places]: the rows of `stride` that the places of the visible patches read."""
        side = self.side(stride)
        return rows_read(reads, self.around(max(axis.reach(side) for axis in reads)), side, self.sites(stride))

    def _outside(self, reads: tuple[Reads, Reads], stride: int) -> Tensor:
        """bool [K, M · places]: which of the places that are read lie beyond the map."""
        side = self.side(stride)
        # All patches of the map bear the number 0, whose rows are the first; beyond it there is none.
        reach = max(axis.reach(side) for axis in reads)
        around = self._at_patches(around_places(torch.zeros_like(self._numbers), reach, missing=1))
        return rows_read(reads, around, side, missing=side**2) == side**2

    def _at_patches(self, grid: Tensor) -> Tensor:
        """[B, fh, fw, …] → [M, …], of the visible patches."""
        return grid[self._patches.unbind(1)]


def _rectangle(first: Pair, length: Pair) -> tuple[Reads, Reads]:
    """What a tile reads: every place one position."""
    return Reads(length[0], 1, first[0]), Reads(length[1], 1, first[1])


def _present(table: Tensor, missing: int, height: int) -> Iterator[tuple[Pair, Tensor, Tensor]]:
    """Of each kernel offset (down, across) of a table [K, n] that finds anything: the columns that do, and what."""
    for offset, entries in enumerate(table):
        columns = (entries < missing).nonzero().flatten()
        if len(columns):
            yield (offset % height, offset // height), columns, entries[columns].long()


def tiles_of(rows: Tensor, window: Window, neighbours: Neighbours, empty: float) -> Tensor:
    """Every visible patch with the halo that the window needs: [M, C, h, w], channels last in memory."""
    (top, left), length = window.before, tile_shape(window, neighbours)
    table = neighbours.tiles(window.in_stride, (-top, -left), length)
    padded = functional.pad(rows, (0, 0, 0, 1), value=empty)
    return padded.index_select(0, table.flatten()).view(*table.shape, -1).permute(0, 3, 1, 2)


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
    around = neighbours.around(reach)
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


def subsample(rows: Tensor, step: int, side: int) -> Tensor:
    """The first of every step × step sites: rows of patches of `side`² sites → of (side / step)² sites."""
    blocks = rows.reshape(-1, side // step, step, side // step, step, rows.shape[1])
    return blocks[:, :, 0, :, 0].flatten(0, 2)


def rows_of(images: Tensor) -> Tensor:
    """[M, C, side, side] → rows [M·side², C]."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def images_of(rows: Tensor, side: int) -> Tensor:
    """Rows [M·side², C] → [M, C, side, side], channels last in memory."""
    return rows.reshape(-1, side, side, rows.shape[1]).permute(0, 3, 1, 2)
