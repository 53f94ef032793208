"""Visible patches with a halo of their neighbours, as small dense images for torch's dense operators."""

import itertools

from torch import Tensor
from torch.nn import functional

from spark_me.sparse.neighbours import Neighbours, Pair, Window


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
