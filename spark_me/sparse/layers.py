"""Sparse layers: torch's own modules, with their arguments, parameters and names, on visible sites.

Every layer maps a `SparseTensor` to another one. How it computes is said by the tensor's pyramid (`backend`); tensors
on another coordinate manager of MinkowskiEngine take its stock kernels. Those exist for float32 and float64 only, so
under autocast they compute in the dtype of the parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn

from spark_me.errors import EngineError
from spark_me.sparse import depthwise, minkowski, native
from spark_me.sparse.neighbours import Pair, Window
from spark_me.sparse.pyramid import Pyramid
from spark_me.sparse.tensor import (
    SparseLayer,
    SparseTensor,
    at_stride,
    compute_dtype,
    is_native,
    stride_of,
    with_features,
)


class Padded(SparseLayer):
    """A layer that looks around its sites.

    Attributes:
        around: zeros that the dense network adds to the map before it, (before, behind), each (down, across).
    """

    around: tuple[Pair, Pair] = ((0, 0), (0, 0))

    def window(self, in_stride: int) -> Window:
        """The geometry on sites of a stride.

        Raises:
            ValueError: if it shifts sites.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Refuse what cannot be computed.

        Raises:
            ValueError: naming it.
        """
        self.window(1)

    @property
    def reads_zeros(self) -> bool:
        """Whether zeros are added around the map."""
        return self.around != ((0, 0), (0, 0))

    def padding_of(self, own: Any) -> tuple[Pair, Pair]:
        """Its own padding, on both sides, with what is added before.

        Raises:
            ValueError: if the map is cropped before: sites would be read where the dense network reads padding.
        """
        (top, left), (bottom, right) = self.around
        down, across = _pair(own)
        if (down and min(top, bottom) < 0) or (across and min(left, right) < 0):
            raise ValueError("pads what is cropped")
        return (down + top, across + left), (down + bottom, across + right)

    def same_window(self, in_stride: int) -> Window:
        """The geometry of its "same" padding.

        Raises:
            ValueError: if there are other zeros around the map.
        """
        me: Any = self
        if self.reads_zeros:
            raise ValueError("pads what is padded with zeros")
        return same_window(in_stride, me.kernel_size, me.stride, getattr(me, "dilation", 1))


class Conv2d(Padded, nn.Conv2d):
    """`torch.nn.Conv2d`: outputs at the visible sites of the output stride, empty neighbours count as zero."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """
        Args:
            arguments, options: those of `torch.nn.Conv2d`, in its order; `padding` has to keep the sites in place.

        Raises:
            ValueError: if the output would not be the input's size divided by the stride, or padding is not by zeros.
        """
        super().__init__(*arguments, **options)
        self.check()

    def check(self) -> None:
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode={self.padding_mode!r}: sparse convolutions pad with zeros")
        super().check()

    def window(self, in_stride: int) -> Window:
        if self.padding == "same":
            return self.same_window(in_stride)
        before, behind = self.padding_of(0 if self.padding == "valid" else self.padding)
        return window_of(in_stride, self.kernel_size, self.stride, self.dilation, before, behind)

    def forward(self, x: SparseTensor) -> SparseTensor:
        return convolve(x, self.weight, self.bias, self.window(stride_of(x)), self.groups)


def convolve(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> SparseTensor:
    """Sparse convolution.

    Args:
        x: features [N_in, Cin].
        weight: [Cout, Cin/groups, kh, kw].
        bias: [Cout].
        window: its geometry.
        groups: as in `torch.nn.Conv2d`.

    Returns:
        Features [N_out, Cout], in autocast's dtype where it is on, else in the weight's.
    """
    if not is_native(x):
        with torch.autocast(x.F.device.type, enabled=False):
            out = minkowski.convolution(with_features(x, x.F.to(weight.dtype)), weight, window, groups)
            return out if bias is None else with_features(out, out.F + bias)
    rows = x.F.to(compute_dtype(weight))
    if depthwise.takes(weight, window, groups):
        return with_features(x, depthwise.convolution(rows, weight, bias, x.coordinate_manager, window))
    rows = native.convolution(rows, weight, window, x.coordinate_manager.neighbours, groups)
    return at_stride(x, window.out_stride, rows if bias is None else rows + bias.to(rows.dtype))


class Pool2d(Padded):
    """A pooling, whose own padding is not zeros."""

    padding: Any

    def check(self) -> None:
        if self.reads_zeros and _pair(self.padding) != (0, 0):
            raise ValueError("pads what is padded with zeros")
        super().check()


class MaxPool2d(Pool2d, nn.MaxPool2d):
    """`torch.nn.MaxPool2d`: the maximum over the visible sites under the kernel; empty sites are ignored, not zero."""

    def window(self, in_stride: int) -> Window:
        before, behind = self.padding_of(self.padding)
        return window_of(in_stride, self.kernel_size, self.stride, self.dilation, before, behind, self.ceil_mode)

    def check(self) -> None:
        if self.return_indices:
            raise ValueError("returns indices, which are of the dense map")
        super().check()

    def forward(self, x: SparseTensor) -> SparseTensor:
        window = self.window(stride_of(x))
        if is_native(x):
            rows = native.max_pool(x.F, window, x.coordinate_manager.neighbours, self.reads_zeros)
            return at_stride(x, window.out_stride, rows)
        if self.reads_zeros:
            raise EngineError("MinkowskiEngine has no pooling of a map that is padded: use the backend native")
        return minkowski.pool(_in_engine_dtype(x), window, "MAX")


class AvgPool2d(Pool2d, nn.AvgPool2d):
    """`torch.nn.AvgPool2d`: the mean over the visible sites under the kernel, and over padding where torch counts it.

    Empty sites enter neither the sum nor the number that divides it, unless `divisor_override` is given.
    """

    def window(self, in_stride: int) -> Window:
        before, behind = self.padding_of(self.padding)
        return window_of(in_stride, self.kernel_size, self.stride, 1, before, behind, self.ceil_mode)

    def forward(self, x: SparseTensor) -> SparseTensor:
        counted = self.count_include_pad or self.reads_zeros
        behind = self.padding_of(self.padding)[1] if counted else None
        return average_pool(x, self.window(stride_of(x)), behind, self.divisor_override)


def average_pool(
    x: SparseTensor, window: Window, behind: Pair | None = None, divisor: int | None = None
) -> SparseTensor:
    """Mean over the visible sites under the kernel.

    Args:
        x: features [N_in, C].
        window: its geometry.
        behind: padding behind the map, where places of padding count as sites that are zero; None: they do not count.
        divisor: what sums are divided by instead of the number of sites.
    """
    if is_native(x):
        sums = at_stride(x, window.out_stride, native.sum_pool(x.F, window, x.coordinate_manager.neighbours))
    else:
        sums = minkowski.pool(_in_engine_dtype(x), window, "SUM")
    return with_features(sums, sums.F / (divisor or _sites_under(x.coordinate_manager, window, behind)))


def _sites_under(pyramid: Pyramid, window: Window, behind: Pair | None) -> Tensor:
    """[N_out, 1], visible sites under the kernel of each output, and places of padding."""
    visible = pyramid.neighbours.counts(window)
    if behind is None or (window.before, behind) == ((0, 0), (0, 0)):
        return visible
    _, *positions = pyramid.neighbours.positions(window.out_stride)
    _, *lengths = pyramid.extent(window.in_stride)
    covered = inside = torch.ones_like(visible[:, 0])
    for position, length, size, near, far in zip(positions, lengths, window.size, window.before, behind):
        first = position * window.stride - near
        last = (first + size).clamp(max=length + far)  # as torch, which counts no place behind the padding
        covered = covered * (last - first)
        inside = inside * (last.clamp(max=length) - first.clamp(min=0))
    return visible + (covered - inside)[:, None]


class DropPath(nn.Module):
    """Stochastic depth: drop the residual branch of whole images, scale the kept ones by 1 / (1 − rate)."""

    def __init__(self, rate: float, scale: bool = True, per_image: bool = True) -> None:
        """
        Args:
            rate: the probability to drop.
            scale: whether what is kept is scaled.
            per_image: draw for each image; or else once for all of them.
        """
        super().__init__()
        self.rate, self.scale, self.per_image = rate, scale, per_image

    def forward(self, x: SparseTensor) -> SparseTensor:
        scale = self.draw(x)
        return x if scale is None else with_features(x, x.F * scale[:, None])

    def draw(self, x: SparseTensor) -> Tensor | None:
        """What to multiply each site of `x` with, [N]: an image's sites share it. None where nothing is dropped."""
        if not self.training or self.rate == 0:
            return None
        pyramid = x.coordinate_manager
        images = pyramid.visible.shape[0]
        kept = torch.rand(images if self.per_image else 1, device=x.F.device) >= self.rate
        scale_of_image = kept.to(x.F.dtype).expand(images)
        if self.scale and self.rate < 1:
            scale_of_image = scale_of_image / (1 - self.rate)
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


def window_of(
    in_stride: int,
    size: Any,
    stride: Any,
    dilation: Any = 1,
    before: Any = 0,
    behind: Any = None,
    ceil: bool = False,
) -> Window:
    """The geometry of a convolution or pooling in torch's terms; each a number or (down, across).

    Args:
        in_stride: tensor stride of the input.
        size: of the kernel.
        stride: of the outputs.
        dilation: of the kernel.
        before, behind: padding on both sides; `behind` is as `before` when None.
        ceil: `ceil_mode` of pooling: the last output may reach over the padding.

    Raises:
        ValueError: if the output of a map of length L would not have L / stride sites: its sites would be shifted.
    """
    size, dilation, before = _pair(size), _pair(dilation), _pair(before)
    behind = before if behind is None else _pair(behind)
    down, across = _pair(stride)
    window = Window(in_stride, size, down, dilation, before)
    for span, near, far in zip(window.span, before, behind):
        # outputs beyond L / stride, for every L that is a multiple of the stride
        rest = near + far - span
        more = (-(-rest // down) if ceil else rest // down) + 1
        if down != across or more:
            raise ValueError(
                f"a kernel of {size[0]}×{size[1]} with stride {down}×{across}, padding {before[0]}×{before[1]} and "
                f"dilation {dilation[0]}×{dilation[1]} shifts sites: the output needs 1/stride of the input's sides"
            )
    return window


def same_window(in_stride: int, size: Any, stride: Any, dilation: Any = 1) -> Window:
    """The geometry of "same" padding, as torch, timm and TensorFlow have it: the odd place of padding comes behind."""
    spans = [step * (each - 1) + 1 for each, step in zip(_pair(size), _pair(dilation))]
    total = [max(span - step, 0) for span, step in zip(spans, _pair(stride))]
    before = [padding // 2 for padding in total]
    return window_of(in_stride, size, stride, dilation, before, [a - b for a, b in zip(total, before)])


def _pair(value: Any) -> Pair:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return first, rest[0] if rest else first


def _in_engine_dtype(x: SparseTensor) -> SparseTensor:
    features: Tensor = x.F
    return x if features.dtype in (torch.float32, torch.float64) else with_features(x, features.float())
