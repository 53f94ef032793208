"""The one import of MinkowskiEngine, and its kernels on a pyramid; all else in `spark_me.sparse` takes it from here."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spark_me.errors import EngineError
from spark_me.sparse.neighbours import Window

with warnings.catch_warnings():
    # A CPU build says so at every import; `spark-me doctor` reports it where it is asked for.
    warnings.filterwarnings("ignore", message=".*compiled with CPU_ONLY.*")
    try:
        import MinkowskiEngine as ME
        from MinkowskiEngine.MinkowskiPooling import MinkowskiLocalPoolingFunction
        from MinkowskiEngineBackend._C import ConvolutionMode, PoolingMode
    except ModuleNotFoundError as error:
        if error.name not in ("MinkowskiEngine", "MinkowskiEngineBackend"):
            raise
        raise EngineError("MinkowskiEngine is not installed: run `spark-me engine install`") from error
    except ImportError as error:
        raise EngineError(
            f"MinkowskiEngine does not load with this torch ({error}): run `spark-me engine install --rebuild`"
        ) from error

__all__ = ["ME", "convolution", "pool", "weight_to_kernel"]


def weight_to_kernel(weight: Tensor) -> Tensor:
    """torch's weight [Cout, Cin/groups, kh, kw] to the engine's kernel [K, Cin/groups, Cout], K = kw·kh.

    The engine numbers kernel offsets with the first spatial axis fastest. With coordinates (image, y, x) that axis is
    y, so its kernel reads as [kw, kh, Cin, Cout]. A symmetric kernel would hide the mistake.
    """
    return weight.permute(3, 2, 1, 0).flatten(0, 1)


def convolution(x: Any, weight: Tensor, window: Window, groups: int) -> Any:
    """The engine's sparse convolution: features [N_in, Cin] → a sparse tensor [N_out, Cout].

    The engine has no groups: each goes through its convolution by itself, and all share one kernel map. Of a depthwise
    convolution, the products with each kernel offset are added up by its kernel map.

    Args:
        x: a sparse tensor.
        weight: [Cout, Cin/groups, kh, kw].
        window: any: a kernel that lies in another place than the engine's is padded with zeros until it is centred.
        groups: as in `torch.nn.Conv2d`.
    """
    if window != window.in_engine:
        weight, window = _centred(weight, window)
    in_key, manager = x.coordinate_map_key, x.coordinate_manager
    out_key = manager.stride(in_key, [window.stride] * 2)
    kernel = weight_to_kernel(weight).contiguous()
    if groups == kernel.shape[2] == x.F.shape[1] > 1:
        rows = _depthwise(x.F, kernel[:, 0], window, in_key, out_key, manager)
    elif window.volume == window.stride == 1:
        rows = torch.cat([f @ k for f, k in zip(x.F.chunk(groups, 1), kernel[0].chunk(groups, 1))], dim=1)
    else:
        settings = _generator(window), ConvolutionMode.DEFAULT, in_key, out_key, manager
        parts = zip(x.F.chunk(groups, dim=1), kernel.chunk(groups, dim=2))
        rows = torch.cat(
            [ME.MinkowskiConvolutionFunction.apply(f.contiguous(), k.contiguous(), *settings) for f, k in parts], dim=1
        )
    return ME.SparseTensor(rows, coordinate_map_key=out_key, coordinate_manager=manager)


def pool(x: Any, window: Window, mode: str) -> Any:
    """The engine's pooling over the visible sites under the kernel: "MAX" or "SUM".

    Raises:
        EngineError: for a kernel in another place than the engine's, which only the native backend has.
    """
    if window != window.in_engine:
        raise EngineError(
            f"MinkowskiEngine has no pooling of {window.size[0]}×{window.size[1]} sites that reaches "
            f"{window.before[0]} back: use the backend native"
        )
    in_key, manager = x.coordinate_map_key, x.coordinate_manager
    out_key = manager.stride(in_key, [window.stride] * 2)
    kind = getattr(PoolingMode, f"LOCAL_{mode}_POOLING")
    rows = MinkowskiLocalPoolingFunction.apply(x.F, kind, _generator(window), in_key, out_key, manager)
    return ME.SparseTensor(rows, coordinate_map_key=out_key, coordinate_manager=manager)


@cache
def _generator(window: Window) -> Any:
    return ME.KernelGenerator(
        kernel_size=list(window.size), stride=window.stride, dilation=list(window.dilation), dimension=2
    )


def _depthwise(rows: Tensor, kernel: Tensor, window: Window, in_key: Any, out_key: Any, manager: Any) -> Tensor:
    """Rows [N_in, C] by a kernel [K, C], where the engine's own layer is a loop too, which autograd cannot use."""
    offsets = manager.kernel_map(in_key, out_key, window.stride, list(window.size), list(window.dilation))
    out = rows.new_zeros(manager.size(out_key), rows.shape[1])
    for offset, pairs in offsets.items():
        inputs, outputs = pairs.long().to(rows.device)
        out = out.index_add(0, outputs, rows[inputs] * kernel[offset])
    return out


def _centred(weight: Tensor, window: Window) -> tuple[Tensor, Window]:
    """The same convolution with zeros around its kernel, which is odd, undilated and centred on the site."""
    dilated = weight.new_zeros(*weight.shape[:2], *window.span)
    dilated[:, :, :: window.dilation[0], :: window.dilation[1]] = weight
    (top, left), (height, width) = window.before, window.span
    down, across = max(top, height - top - 1), max(left, width - left - 1)
    around = (across - left, across + left + 1 - width, down - top, down + top + 1 - height)
    padded = torch.nn.functional.pad(dilated, around)
    return padded, Window(window.in_stride, (2 * down + 1, 2 * across + 1), window.stride, (1, 1), (down, across))
