"""The visible sites of a batch at every stride, inserted into one coordinate manager in canonical order."""

import torch
from torch import Tensor

from spark_me.errors import EngineError
from spark_me.sparse.minkowski import ME
from spark_me.sparse.neighbours import Neighbours

BACKENDS = ("fused", "minkowski")


class Pyramid(ME.CoordinateManager):
    """MinkowskiEngine's coordinate manager, filled from `visible` alone before the first layer runs.

    The rows of stride s are ordered by image, then patch row-major, then position within the patch row-major
    (canonical order), so that row `i` belongs to patch `i // (P/s)²`. MinkowskiEngine finds these maps by their
    stride when a strided layer asks for one: the order holds at every layer, and runs are deterministic.

    Attributes:
        visible: bool [B, fh, fw].
        patch_size: P, a power of two; also the deepest stride.
        backend: how the layers that receive tensors of this pyramid compute.
        neighbours: index tables of the `fused` backend, built on first use.
    """

    def __init__(self, visible: Tensor, patch_size: int, backend: str = "minkowski") -> None:
        """
        Args:
            visible: bool [B, fh, fw], True = kept; every image needs at least one visible patch.
            patch_size: P.
            backend: one of `BACKENDS`.

        Raises:
            ValueError: for another shape or dtype, an image without a visible patch, an unknown backend.
        """
        if visible.dtype != torch.bool or visible.dim() != 3:
            raise ValueError(f"visible must be bool [B, fh, fw], not {visible.dtype} {tuple(visible.shape)}")
        if not visible.flatten(1).any(dim=1).all():
            raise ValueError("every image needs at least one visible patch")
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
        on_gpu = visible.device.type == "cuda"
        super().__init__(
            D=2,
            # Left to itself, the engine sets the number of OpenMP threads of the whole process.
            num_threads=torch.get_num_threads(),
            coordinate_map_type=ME.CoordinateMapType.CUDA if on_gpu else ME.CoordinateMapType.CPU,
        )
        self.visible = visible
        self.patch_size = patch_size
        self.backend = backend
        self.neighbours = Neighbours(visible, patch_size)
        self.strides = tuple(2**level for level in range(patch_size.bit_length()))
        self._keys = {stride: self._insert(stride) for stride in self.strides}
        self._raster_indices: dict[int, Tensor] = {}

    def key(self, stride: int) -> "ME.CoordinateMapKey":
        """MinkowskiEngine's key of the sites at `stride`."""
        return self._keys[stride]

    def extent(self, stride: int) -> tuple[int, int, int]:
        """(B, H/s, W/s): the dense shape that the sites of `stride` lie in."""
        images, rows, columns = self.visible.shape
        side = self.patch_size // stride
        return images, rows * side, columns * side

    def coordinates(self, stride: int) -> Tensor:
        """int64 [N, 3], (image, y, x) in pixels of the sites at `stride`, canonical order."""
        image, y, x = self.neighbours.positions(stride)
        return torch.stack([image, y * stride, x * stride], dim=1)

    def raster_index(self, stride: int) -> Tensor:
        """int64 [N], each site's place in a dense [B, H/s, W/s] map, flattened."""
        if stride not in self._raster_indices:
            image, y, x = self.neighbours.positions(stride)
            _, height, width = self.extent(stride)
            self._raster_indices[stride] = (image * height + y) * width + x
        return self._raster_indices[stride]

    def image_index(self, stride: int) -> Tensor:
        """int64 [N], the image that each site belongs to."""
        return self.neighbours.positions(stride)[0]

    def _insert(self, stride: int) -> "ME.CoordinateMapKey":
        coordinates = self.coordinates(stride).int().contiguous()
        key, (kept_rows, _) = self.insert_and_map(coordinates, (stride, stride), "")
        expected = torch.arange(len(coordinates), device=kept_rows.device)
        # Everything downstream reshapes by row number, so a reordering engine must not pass unnoticed.
        if not torch.equal(kept_rows.long(), expected):
            raise EngineError(f"MinkowskiEngine reordered the sites of stride {stride}: run `spark-me doctor`")
        return key
