"""The visible sites of a batch at every stride, inserted into one coordinate manager in canonical order."""

from typing import Any

import torch
from torch import Tensor

from spark_me.errors import EngineError
from spark_me.sparse.minkowski import ME
from spark_me.sparse.neighbours import Neighbours, VisiblePatches

BACKENDS = ("native", "minkowski")


class Pyramid(ME.CoordinateManager):
    """MinkowskiEngine's coordinate manager, filled from `visible` alone and before any layer of the engine runs.

    The rows of stride s are ordered by image, then patch row-major, then position within the patch row-major
    (canonical order), so that row `i` belongs to patch `i // (P/s)²`. MinkowskiEngine finds these maps by their
    stride when a strided layer asks for one: the order holds at every layer, and runs are deterministic.

    The number and places of the sites are known on the host, so no size is ever read back from a device. The `native`
    backend asks the engine for nothing; the engine's manager is made, and its maps are inserted, when something does.

    Attributes:
        visible: bool [B, fh, fw], on the device.
        patch_size: P, a power of two; also the deepest stride.
        backend: how the layers that receive tensors of this pyramid compute.
        neighbours: index tables of the `native` backend, built on first use.
    """

    _engine_manager: Any = None

    def __init__(
        self,
        visible: Tensor | VisiblePatches,
        patch_size: int,
        backend: str = "minkowski",
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            visible: bool [B, fh, fw], True = kept, as `VisiblePatches.of` takes it; or these, on their device already.
            patch_size: P.
            backend: one of `BACKENDS`.
            device: of features and tables; that of `visible` when None.

        Raises:
            ValueError: as `VisiblePatches.of`, and for an unknown backend.
        """
        patches = visible if isinstance(visible, VisiblePatches) else VisiblePatches.of(visible, device)
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
        self.D = 2  # dimensions; `_fill` does what else the engine's own class begins with
        self.visible = patches.visible
        self.patch_size = patch_size
        self.backend = backend
        self.neighbours = Neighbours(patches, patch_size)
        self.strides = tuple(2**level for level in range(patch_size.bit_length()))
        self._keys = {stride: ME.CoordinateMapKey([stride, stride], "") for stride in self.strides}
        self._raster_indices: dict[int, Tensor] = {}

    def key(self, stride: int) -> "ME.CoordinateMapKey":
        """MinkowskiEngine's key of the sites at `stride`."""
        return self._keys[stride]

    def extent(self, stride: int) -> tuple[int, int, int]:
        """(B, H/s, W/s): the dense shape that the sites of `stride` lie in."""
        return self.neighbours.extent(stride)

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

    def raster(self, rows: Tensor, stride: int, fill: Tensor | None = None) -> Tensor:
        """Lay features [N, C] at `stride` into dense maps [B, C, H/s, W/s], channels last in memory.

        Args:
            rows: features, canonical order.
            stride: tensor stride of the rows.
            fill: [C], the value at every empty site; zero when None.
        """
        images, height, width = self.extent(stride)
        shape = images * height * width, rows.shape[1]
        places = rows.new_zeros(shape) if fill is None else fill.to(rows.dtype).expand(shape).clone()
        places = places.index_copy_(0, self.raster_index(stride), rows)
        return places.view(images, height, width, -1).permute(0, 3, 1, 2)

    def image_index(self, stride: int) -> Tensor:
        """int64 [N], the image that each site belongs to."""
        return self.neighbours.positions(stride)[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n{self._manager})"

    @property
    def _manager(self) -> Any:
        """The engine's own manager. All of MinkowskiEngine reaches it through here; the first time, it is filled."""
        if self._engine_manager is None:
            self._fill()
        return self._engine_manager

    @_manager.setter
    def _manager(self, manager: Any) -> None:
        self._engine_manager = manager

    def _fill(self) -> None:
        on_gpu = self.visible.is_cuda
        if on_gpu:
            require_engine_for(self.visible.device)
        super().__init__(
            D=2,
            # Left to itself, the engine sets the number of OpenMP threads of the whole process.
            num_threads=torch.get_num_threads(),
            coordinate_map_type=ME.CoordinateMapType.CUDA if on_gpu else ME.CoordinateMapType.CPU,
        )
        for stride in self.strides:
            self._insert(stride)

    def _insert(self, stride: int) -> None:
        coordinates = self.coordinates(stride).int().contiguous()
        _, (kept_rows, _) = self.insert_and_map(coordinates, (stride, stride), "")
        expected = torch.arange(len(coordinates), device=kept_rows.device)
        # Everything downstream reshapes by row number, so a reordering engine must not pass unnoticed. Neither of the
        # engine's maps reorders unique rows: on CUDA, row i writes entry i, and a stable removal drops duplicates.
        if not torch.equal(kept_rows.long(), expected):
            raise EngineError(f"MinkowskiEngine reordered the sites of stride {stride}: run `spark-me doctor`")


def require_engine_for(gpu: torch.device) -> None:
    """Refuse what the engine would compute wrongly or not at all.

    Raises:
        EngineError: with the way out.
    """
    if not ME.is_cuda_available():
        raise EngineError(
            "the installed engine is built for the CPU: run `spark-me engine install --cuda`, or use the backend native"
        )
    # Its kernels run on the current GPU; some on the default stream, some on the current one.
    if torch.cuda.current_device() != gpu.index or torch.cuda.current_stream(gpu) != torch.cuda.default_stream(gpu):
        raise EngineError(
            f"MinkowskiEngine computes on the current GPU and its default stream alone: call torch.cuda.set_device("
            f"{gpu.index}) and use no stream of your own, or use the backend native"
        )
