"""Visible patches with a halo of their neighbours, as small dense images for torch's dense operators."""

import itertools

from torch import Tensor
from torch.nn import functional

from spark_me.sparse.neighbours import Neighbours, Window


def _gather(rows: Tensor, table: Tensor, empty: float = 0.0) -> Tensor:
    """rows [N, C] and table [M, K] → [M, K·C]; `empty` where the table says N."""
    padded = functional.pad(rows, (0, 0, 0, 1), value=empty)
    return padded.index_select(0, table.flatten()).view(table.shape[0], -1)


def tiles_of(rows: Tensor, window: Window, neighbours: Neighbours, empty: float) -> Tensor:
    """Every visible patch with the halo that the window needs: [M, C, L, L], channels last in memory."""
    length = _tile_length(window, neighbours)
    table = neighbours.of_tiles(window.in_stride, -window.before, length)
    tiles = _gather(rows, table.flatten(1), empty)
    return tiles.view(-1, length, length, rows.shape[1]).permute(0, 3, 1, 2)


def _tile_length(window: Window, neighbours: Neighbours) -> int:
    out_side = neighbours.side(window.out_stride)
    return (out_side - 1) * window.stride + window.span


def fold(tiles: Tensor, window: Window, neighbours: Neighbours) -> Tensor:
    """Adjoint of `tiles_of`: add every tile's halo to the patch that it came from, [M, C, L, L] → [N, C]."""
    side, length, start = neighbours.side(window.in_stride), tiles.shape[2], window.before
    images = tiles.permute(0, 2, 3, 1)
    folded = images[:, start : start + side, start : start + side]
    unread = side - folded.shape[1]  # a kernel shorter than its stride leaves the patch's last sites out
    folded = functional.pad(folded, (0, 0, 0, unread, 0, unread)).contiguous()
    patches = -(-max(start, length - start - side) // side)  # that the halo reaches over
    steps = range(-patches, patches + 1)
    around = neighbours.of_tiles(neighbours.patch_size, -patches, len(steps))
    for down, across in itertools.product(steps, steps):
        # the tile of the patch `down`, `across` of mine starts here in my coordinates
        mine_y, theirs_y = _overlap(down * side - start, length, side)
        mine_x, theirs_x = _overlap(across * side - start, length, side)
        if (down or across) and mine_y.start < mine_y.stop and mine_x.start < mine_x.stop:
            halo = functional.pad(images[:, theirs_y, theirs_x], (0, 0, 0, 0, 0, 0, 0, 1))
            folded[:, mine_y, mine_x] += halo.index_select(0, around[:, patches + down, patches + across])
    return folded.view(-1, tiles.shape[1])


def _overlap(start: int, length: int, side: int) -> tuple[slice, slice]:
    """Where [start, start + length) overlaps [0, side), in the coordinates of the latter and of the former."""
    first, last = max(0, start), min(side, start + length)
    return slice(first, last), slice(first - start, last - start)


def rows_of(images: Tensor) -> Tensor:
    """[M, C, side, side] → rows [M·side², C]."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def images_of(rows: Tensor, side: int) -> Tensor:
    """Rows [M·side², C] → [M, C, side, side], channels last in memory."""
    return rows.reshape(-1, side, side, rows.shape[1]).permute(0, 3, 1, 2)
