"""Convolutions of masked maps by dense torch in float64: what the GPU kernels are compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from spark_me import sparse
from spark_me.sparse.neighbours import Window

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def square_window(in_stride: int, size: int, stride: int = 1, dilation: int = 1) -> Window:
    """A square kernel, where MinkowskiEngine lays it."""
    return Window(in_stride, (size, size), stride, (dilation, dilation), (0, 0)).in_engine


def random(*shape: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    """Noise that needs a gradient, the same on every device."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(device, dtype).requires_grad_()


def results(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of the inputs, by an upstream that is the same for the same shape."""
    upstream = random(*out.shape, dtype=out.dtype, seed=9, device=str(out.device)).detach()
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def dense_rows(rows: Tensor, pyramid: sparse.Pyramid, stride: int) -> Tensor:
    """Rows [N, C] in a map [B, C, h, w], zero at empty sites; places counted from the pyramid's coordinates."""
    images, height, width = pyramid.extent(stride)
    image, y, x = pyramid.coordinates(stride).to(rows.device).unbind(1)
    dense = rows.new_zeros(images, height, width, rows.shape[1])
    return dense.index_put((image, y // stride, x // stride), rows).permute(0, 3, 1, 2)


def rows_of_map(dense: Tensor, pyramid: sparse.Pyramid, stride: int) -> Tensor:
    """The sites of a map [B, C, h, w]: [N, C]."""
    image, y, x = pyramid.coordinates(stride).to(dense.device).unbind(1)
    return dense[image, :, y // stride, x // stride]


def torch_weight(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """[K, Cin, Cout] → [Cout, Cin, h, w], offset by offset: y varies fastest."""
    height, width = size
    rows = [torch.stack([kernel[across * height + down] for across in range(width)], dim=-1) for down in range(height)]
    return torch.stack(rows, dim=-2).transpose(0, 1)


def convolution(rows: Tensor, weight: Tensor, window: Window, pyramid: sparse.Pyramid, groups: int = 1) -> Tensor:
    """Rows [N_in, Cin] by torch's weight [Cout, Cin/groups, h, w] → [N_out, Cout]."""
    (top, left), (height, width) = window.before, window.span
    # behind the map, more than is read; a kernel that starts behind its site crops the map
    dense = functional.pad(dense_rows(rows, pyramid, window.in_stride), [left, left + width, top, top + height])
    out = functional.conv2d(dense, weight, None, window.stride, 0, window.dilation, groups)
    return rows_of_map(out, pyramid, window.out_stride)


def convolution_to_map(rows: Tensor, kernel: Tensor, stride: int, pyramid: sparse.Pyramid) -> Tensor:
    """Rows [N, Cin] by a square kernel [K, Cin, Cout] → [B·h·w, Cout]."""
    side = round(len(kernel) ** 0.5)
    weight = torch_weight(kernel, (side, side))
    out = functional.conv2d(dense_rows(rows, pyramid, stride), weight, padding="same")
    return out.permute(0, 2, 3, 1).flatten(0, 2)


def doubled(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in float64."""
    return [x.detach().double().requires_grad_() for x in inputs]


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Outputs and gradients agree with float64's, each by ‖difference‖ / ‖expected‖."""
    for number, (ours, theirs) in enumerate(zip(actual, expected)):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert error < TOLERANCE[dtype], f"result {number}: relative error {error:.1e}"
