"""Sparse layers: MinkowskiEngine's own modules and parameters behind the constructor calls of `torch.nn`.

Every layer maps a `SparseTensor` to another one. How it computes is said by the tensor's pyramid (`backend`); tensors
on another coordinate manager of MinkowskiEngine take its stock kernels. Those exist for float32 and float64 only, so
under autocast they compute in the dtype of the parameters.
"""

import torch
from torch import Tensor, nn

from spark_me.sparse import fused
from spark_me.sparse.minkowski import ME, Copied
from spark_me.sparse.neighbours import Window
from spark_me.sparse.tensor import SparseTensor, at_stride, compute_dtype, is_fused, stride_of, with_features


class Conv2d(Copied, ME.MinkowskiConvolution):
    """Sparse convolution: outputs at the visible sites of the output stride, empty neighbours count as zero.

    Odd kernels are centred (padding dilation · (k // 2)), even kernels start at the site (no padding).

    `kernel` is [K, Cin/groups, Cout], or [Cin/groups, Cout] for 1×1 stride 1. As in torch's [Cout, Cin/groups, k, k],
    the output channels of a group lie side by side; `spark_me.weights.kernels` brings one layout to the other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        """
        Args:
            in_channels: Cin.
            out_channels: Cout.
            kernel_size: k.
            stride: steps of the output, in sites of the input.
            groups: in how many groups the channels fall; a group's outputs see its inputs alone.
            dilation: distance of neighbouring kernel offsets, in sites of the input.
            bias: whether a constant [1, Cout] is added.

        Raises:
            ValueError: if `groups` does not divide both numbers of channels, or `dilation` is not positive.
        """
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} does not divide {in_channels} input and {out_channels} output channels")
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, not {dilation}")
        super().__init__(
            in_channels // groups,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            bias=bias,
            dimension=2,
        )
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.groups = groups
        self.dilation = dilation

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not is_fused(x):
            with torch.autocast(x.F.device.type, enabled=False):
                x = with_features(x, x.F.to(self.kernel.dtype))
                return super().forward(x) if self.groups == 1 else self._convolve_groups(x)
        dtype = compute_dtype(self.kernel)
        window = Window(stride_of(x), self.kernel_size, self.stride, self.dilation)
        neighbours = x.coordinate_manager.neighbours
        rows = fused.convolution(x.F.to(dtype), self.kernel.to(dtype), window, neighbours, self.groups)
        if self.bias is not None:
            rows = rows + self.bias.to(dtype)
        return at_stride(x, window.out_stride, rows)

    def _convolve_groups(self, x: SparseTensor) -> SparseTensor:
        """Each group through the engine's own convolution, which knows no groups; they share one kernel map."""
        in_key, manager = x.coordinate_map_key, x.coordinate_manager
        # the engine fills in an empty key: the first group names the output's sites, the others find them
        out_key = in_key if self.use_mm else ME.CoordinateMapKey(in_key.get_coordinate_size())
        groups = []
        for rows, kernel in zip(x.F.chunk(self.groups, dim=1), self.kernel.chunk(self.groups, dim=-1)):
            if self.use_mm:
                groups.append(rows @ kernel)
            else:
                settings = self.kernel_generator, self.convolution_mode, in_key, out_key, manager
                groups.append(self.conv.apply(rows.contiguous(), kernel.contiguous(), *settings))
        rows = torch.cat(groups, dim=1)
        if self.bias is not None:
            rows = rows + self.bias
        return SparseTensor(rows, coordinate_map_key=out_key, coordinate_manager=manager)

    def reset_parameters(self, is_transpose: bool = False) -> None:
        """Draw kernel and bias from U(−1/√n, 1/√n), n = K·Cin/groups, as torch and the engine do."""
        bound = self.kernel[..., 0].numel() ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, groups={self.groups})"


class MaxPool2d(Copied, ME.MinkowskiMaxPooling):
    """Maximum over the visible sites under the kernel; empty sites are ignored, not taken as zero.

    The dense simulation does take them as zero: it agrees for inputs that are nowhere negative, such as after ReLU.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__(kernel_size=kernel_size, stride=stride, dimension=2)
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not is_fused(x):
            return super().forward(_in_engine_dtype(x))
        window = Window(stride_of(x), self.kernel_size, self.stride)
        return at_stride(x, window.out_stride, fused.max_pool(x.F, window, x.coordinate_manager.neighbours))


class AvgPool2d(Copied, ME.MinkowskiAvgPooling):
    """Mean over the visible sites under the kernel: divides by their number, not by the kernel's volume."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__(kernel_size=kernel_size, stride=stride, dimension=2)
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: SparseTensor) -> SparseTensor:
        if not is_fused(x):
            return super().forward(_in_engine_dtype(x))
        window = Window(stride_of(x), self.kernel_size, self.stride)
        return at_stride(x, window.out_stride, fused.average_pool(x.F, window, x.coordinate_manager.neighbours))


class DropPath(nn.Module):
    """Stochastic depth: drop the residual branch of whole images, scale the kept ones by 1 / (1 − rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: SparseTensor) -> SparseTensor:
        scale = self.draw(x)
        return x if scale is None else with_features(x, x.F * scale[:, None])

    def draw(self, x: SparseTensor) -> Tensor | None:
        """What to multiply each site of `x` with, [N]: an image's sites share it. None where nothing is dropped."""
        if not self.training or self.rate == 0:
            return None
        pyramid = x.coordinate_manager
        kept = torch.rand(pyramid.visible.shape[0], device=x.F.device) >= self.rate
        scale_of_image = kept.to(x.F.dtype) / (1 - self.rate)
        return scale_of_image[pyramid.image_index(stride_of(x))]

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def add(x: SparseTensor, y: SparseTensor) -> SparseTensor:
    """Residual sum of two tensors on the same sites.

    Raises:
        ValueError: if the two live on different sites.
    """
    require_same_sites(x, y)
    return with_features(x, x.F + y.F)


def require_same_sites(x: SparseTensor, y: SparseTensor) -> None:
    """Refuse to add two tensors that live on different sites.

    Raises:
        ValueError: if they do.
    """
    if x.coordinate_manager is not y.coordinate_manager or x.coordinate_map_key != y.coordinate_map_key:
        raise ValueError("cannot add sparse tensors of different sites")


def _in_engine_dtype(x: SparseTensor) -> SparseTensor:
    features: Tensor = x.F
    return x if features.dtype in (torch.float32, torch.float64) else with_features(x, features.float())
