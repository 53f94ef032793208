"""What the functions of dense networks mean on rows of sites: one table, by the names of functions and methods.

An entry takes a call as it stands in the dense network's graph, and returns what computes it on sparse tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spark_me.sparse.images import (
    global_average,
    global_maximum,
    mean_over_images,
    scale_images,
    sites_of_images,
    spread_over_sites,
    sum_over_images,
)
from spark_me.sparse.layers import add, convolve, same_window, window_of
from spark_me.sparse.neighbours import Window, subsample
from spark_me.sparse.rules.modules import layer_of, require_channels_last, shown_axes
from spark_me.sparse.tensor import SparseTensor, at_stride, stride_of, with_features
from spark_me.trace import Value


@dataclass
class Call:
    """A function in a dense network's graph.

    Attributes:
        name: of the function or method.
        function: the function; of a method, one of `torch.Tensor`.
        args, kwargs: its arguments, tensors as `Value`, which also appear in `operands`.
        operands: the tensors among the arguments, in their order.
        out: what it returns.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: list[Value]
    out: Any

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


def is_sparse(value: Any) -> bool:
    """Whether a value is a sparse tensor."""
    return isinstance(value, SparseTensor)  # type: ignore[misc]  # the engine has no types


Compute = Callable[..., Any]
"""From the operands (sparse tensors, and dense tensors of images or parameters) to the result."""
Rule = Callable[[Call], Compute]
FUNCTIONS: dict[str, Rule] = {}


def function_of(call: Call) -> Compute:
    """What computes a call on sparse tensors.

    Raises:
        ValueError: if there is no rule, or it cannot compute the call.
    """
    if call.name not in FUNCTIONS:
        raise ValueError("has no rule")
    return FUNCTIONS[call.name](call)


def _functions(*names: str) -> Callable[[Rule], Rule]:
    def register(make: Rule) -> Rule:
        FUNCTIONS.update(dict.fromkeys(names, make))
        return make

    return register


# Functions of each value by itself, of one tensor or of several that are broadcast: a value of an image counts at each
# of its sites, a parameter at all.
POINTWISE = (
    "add", "iadd", "sub", "isub", "rsub", "mul", "imul", "div", "truediv", "itruediv", "true_divide", "neg", "pow",
    "square", "sqrt", "rsqrt", "exp", "log", "abs", "reciprocal", "maximum", "minimum", "clamp", "clip", "addcmul",
    "lerp", "where", "tanh", "sigmoid", "erf", "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_",
    "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "hardtanh_", "softplus", "softsign",
    "add_", "sub_", "mul_", "div_", "clamp_", "sigmoid_", "tanh_", "logsigmoid", "log_sigmoid", "threshold",
    "_threshold", "float", "to", "type_as", "dropout", "multiply", "subtract", "divide",
)  # fmt: skip


@_functions(*POINTWISE)
def _pointwise(call: Call) -> Compute:
    out: Value = call.out
    if not isinstance(out, Value) or not out.is_map:
        raise ValueError(f"gives {out}, no map")
    maps = [value for value in call.operands if value.is_map]
    same = len(maps) == len(call.operands) == 2 and maps[0].axes == maps[1].axes
    if call.name in ("add", "iadd") and same and not call.kwargs:
        return add
    if call.name in ("mul", "imul", "multiply") and len(call.operands) == 2 and len(maps) == 1:
        other = next(value for value in call.operands if not value.is_map)
        if other.of_images and _channel_shape(other, out) == _channel_shape(maps[0], out) == out.channels:
            return _scaled
    shapes = [_channel_shape(value, out) for value in call.operands]
    kinds = ["map" if value.is_map else "images" if value.of_images else "constant" for value in call.operands]
    return Pointwise(call, list(zip(kinds, shapes)))


def _scaled(one: Any, other: Any) -> SparseTensor:
    """The sites of each image by its own factors [B, C, …], in either order."""
    x, factors = (one, other) if is_sparse(one) else (other, one)
    return with_features(x, scale_images(x.F, factors.flatten(1), x.coordinate_manager, stride_of(x)))


def _channel_shape(value: Value, out: Value) -> tuple[int, ...]:
    """How an operand's channels lie beside those of the result, which it is broadcast to."""
    axes: tuple[Any, ...] = (1,) * (len(out.axes) - len(value.axes)) + value.axes
    shape = []
    for axis, theirs in zip(axes, out.axes):
        if isinstance(axis, int) and isinstance(theirs, int):
            shape.append(axis)
        elif axis != theirs and (axis != 1 or value.is_map):
            raise ValueError(f"cannot broadcast {shown_axes(value)} to {shown_axes(out)}")
    return tuple(shape)


@dataclass
class Pointwise:
    """A function of rows, with all operands laid beside them."""

    call: Call
    kinds: list[tuple[str, tuple[int, ...]]]

    def __call__(self, *operands: Any) -> SparseTensor:
        like = next(each for each in operands if is_sparse(each))
        rows = iter([self._rows(each, *kind, like) for each, kind in zip(operands, self.kinds)])
        args = [_filled(each, rows) for each in self.call.args]
        kwargs = {name: _filled(each, rows) for name, each in self.call.kwargs.items()}
        out = self.call.function(*args, **kwargs)
        return with_features(like, _joined_rows(out))

    def _rows(self, operand: Any, kind: str, shape: tuple[int, ...], like: SparseTensor) -> Tensor:
        if kind == "map":
            rows = operand.F
        elif kind == "images":
            rows = spread_over_sites(operand.flatten(1), like.coordinate_manager, stride_of(like))
        else:
            return operand.reshape(shape)
        return rows if len(shape) == 1 else rows.view(-1, *shape)


def _joined_rows(rows: Tensor) -> Tensor:
    """[N, …] → [N, C]; without any axis of channels, C = 1."""
    return rows.flatten(1) if rows.dim() > 1 else rows[:, None]


def _filled(argument: Any, rows: Any) -> Any:
    if isinstance(argument, Value):
        return next(rows)
    if isinstance(argument, tuple | list):
        return type(argument)(_filled(each, rows) for each in argument)
    return argument


@_functions("contiguous", "clone", "detach_copy", "alias")
def _same(call: Call) -> Compute:
    return _identity


def _identity(x: SparseTensor, *others: Any) -> SparseTensor:
    return x


@_functions("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as")
def _reshaped(call: Call) -> Compute:
    """Axes of channels are joined or split, those of sites flattened: the rows are the same."""
    before, after = (_joined_channels(value) for value in (call.operands[0], call.out))
    if not isinstance(call.out, Value) or not call.out.is_map or before != after:
        raise ValueError(f"mixes sites and channels: {shown_axes(call.operands[0])} becomes {shown_axes(call.out)}")
    return _identity


def _joined_channels(value: Value) -> list[Any]:
    joined: list[Any] = []
    for axis in value.axes:
        if axis == "HW":
            joined += ["H", "W"]
        elif isinstance(axis, int) and joined and isinstance(joined[-1], int):
            joined[-1] *= axis
        elif axis != 1:
            joined.append(axis)
    return joined


@_functions("expand_as")
def _expanded(call: Call) -> Compute:
    """Values of images at each of their sites."""
    value, like = call.operands
    if not value.of_images or not like.is_map or _channel_shape(value, like) != like.channels:
        raise ValueError(f"expands {shown_axes(value)} to {shown_axes(like)}")
    return _spread


def _spread(of_images: Tensor, like: SparseTensor) -> SparseTensor:
    rows = spread_over_sites(of_images.flatten(1), like.coordinate_manager, stride_of(like))
    return with_features(like, rows)


@_functions("permute", "transpose", "movedim", "moveaxis", "swapaxes")
def _permuted(call: Call) -> Compute:
    """Channels among themselves are permuted; where the sites' axes stand beside them makes no difference."""
    value = call.operands[0]
    count = len(value.axes)
    # which axis goes where, found by doing it to numbers
    places = call.function(torch.empty(tuple(range(2, 2 + count))), *call.args[1:], **call.kwargs).shape
    order = [place - 2 for place in places]
    sites = [axis for axis in (value.axes[place] for place in order) if axis in ("H", "W")]
    if order[0] != 0 or sites == ["W", "H"]:
        raise ValueError(f"changes the order of {shown_axes(value)} to {shown_axes(call.out)}")
    channels = [place for place in range(count) if isinstance(value.axes[place], int)]
    moved = [channels.index(place) for place in order if place in channels]
    if moved == sorted(moved):
        return _identity
    return partial(_permute_channels, shape=value.channels, order=moved)


def _permute_channels(x: SparseTensor, shape: tuple[int, ...], order: list[int]) -> SparseTensor:
    rows = x.F.view(-1, *shape).permute(0, *(1 + place for place in order))
    return with_features(x, rows.flatten(1))


@_functions("cat", "concat", "concatenate")
def _concatenated(call: Call) -> Compute:
    """Channels side by side."""
    first = call.operands[0]
    place = _channel_place(first, call.argument(1, "dim", call.kwargs.get("axis", 0)))
    for value in call.operands:
        if not value.is_map or len(value.axes) != len(first.axes):
            raise ValueError(f"joins {shown_axes(first)} with {shown_axes(value)}")
    return partial(_combine, torch.cat, shapes=[value.channels for value in call.operands], place=place)


def _combine(
    combine: Callable[..., Tensor], *tensors: SparseTensor, shapes: list[tuple[int, ...]], place: int
) -> SparseTensor:
    rows = combine([x.F.view(-1, *shape) for x, shape in zip(tensors, shapes)], dim=1 + place)
    return with_features(tensors[0], rows.flatten(1))


@_functions("stack")
def _stacked(call: Call) -> Compute:
    """A new axis of channels."""
    out: Value = call.out
    axis = call.argument(1, "dim", 0) % len(out.axes)
    if not isinstance(out.axes[axis], int) or axis == 0:
        raise ValueError(f"gives {shown_axes(out)}")
    place = sum(isinstance(each, int) for each in out.axes[:axis])
    return partial(_combine, torch.stack, shapes=[value.channels for value in call.operands], place=place)


def _channel_place(value: Value, dim: Any) -> int:
    """Which axis of channels a dense axis is."""
    axis = dim % len(value.axes)
    if not isinstance(value.axes[axis], int):
        raise ValueError(f"works along {value.axes[axis]} of {shown_axes(value)}, not along channels")
    return sum(isinstance(each, int) for each in value.axes[:axis])


@_functions("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
def _divided(call: Call) -> Compute:
    """Parts of the channels."""
    value = call.operands[0]
    place_of_dim = 1 if call.name == "unbind" else 2
    place = _channel_place(value, call.argument(place_of_dim, "dim", 0))
    amount = call.args[1:place_of_dim] or tuple(each for name, each in call.kwargs.items() if name != "dim")
    return partial(_divide, shape=value.channels, place=place, name=call.name, amount=amount)


def _divide(
    x: SparseTensor, shape: tuple[int, ...], place: int, name: str, amount: tuple[Any, ...]
) -> tuple[SparseTensor, ...]:
    parts = getattr(torch, name)(x.F.view(-1, *shape), *amount, dim=1 + place)
    return tuple(with_features(x, _joined_rows(part)) for part in parts)


@_functions("getitem", "narrow")
def _selected(call: Call) -> Compute:
    """A part of the channels, or every n-th site."""
    value, index = call.operands[0], call.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if call.name == "narrow" or any(isinstance(each, Value | list) for each in index):
        raise ValueError("selects in a way that has no rule")
    if Ellipsis in index:
        place, missing = index.index(Ellipsis), len(value.axes) - len(index) + 1
        index = index[:place] + (slice(None),) * missing + index[place + 1 :]
    index += (slice(None),) * (len(value.axes) - len(index))
    steps = [each.step or 1 for axis, each in zip(value.axes, index) if axis in ("H", "W")]
    for axis, each in zip(value.axes, index):
        if not isinstance(axis, int) and (not isinstance(each, slice) or each.start or each.stop is not None):
            raise ValueError(f"selects along {axis} of {shown_axes(value)}")
    if not isinstance(call.out, Value) or not call.out.is_map or len(set(steps)) > 1:
        raise ValueError(f"selects {call.out} of {shown_axes(value)}")
    channels = tuple(each for axis, each in zip(value.axes, index) if isinstance(axis, int))
    return partial(_select, shape=value.channels, index=channels, step=steps[0] if steps else 1)


def _select(x: SparseTensor, shape: tuple[int, ...], index: tuple[Any, ...], step: int) -> SparseTensor:
    stride, rows = stride_of(x), x.F.view(-1, *shape)[(slice(None), *index)]
    rows = _joined_rows(rows)
    if step == 1:
        return with_features(x, rows)
    rows = subsample(rows, step, x.coordinate_manager.neighbours.side(stride))
    return at_stride(x, stride * step, rows)


# Reductions over the sites of each image give a dense tensor, those over channels a map.
@_functions("mean", "sum", "amax", "var", "std", "norm", "vector_norm", "linalg_vector_norm", "softmax", "logsumexp")
def _reduced(call: Call) -> Compute:
    value = call.operands[0]
    place_of_dim = 2 if call.name in ("norm", "vector_norm", "linalg_vector_norm") else 1
    dim = call.argument(place_of_dim, "dim", call.kwargs.get("axis"))
    dims = () if dim is None else dim if isinstance(dim, tuple | list) else (dim,)
    axes = [value.axes[each] for each in dims]
    if axes and all(isinstance(axis, int) for axis in axes):
        places = [1 + _channel_place(value, each) for each in dims]
        return _OfChannels(call, value.channels, places, place_of_dim)
    if sorted(map(str, axes)) not in (["H", "W"], ["HW"]) or not isinstance(call.out, Value) or not call.out.of_images:
        raise ValueError(
            f"reduces {', '.join(map(str, axes)) or 'all'} of {shown_axes(value)}: over height and width, or channels"
        )
    order = call.argument(1, "p", call.kwargs.get("ord", 2)) if place_of_dim == 2 else 2
    if call.name not in REDUCTIONS or order not in (2, 2.0, "fro") or call.kwargs.get("correction", 1) != 1:
        raise ValueError("has no rule over sites")
    return partial(_reduce, reduction=REDUCTIONS[call.name], shape=call.out.axes[1:])


def _reduce(x: SparseTensor, reduction: Callable[[SparseTensor], Tensor], shape: Sequence[Any]) -> Tensor:
    out = reduction(x)
    return out.view(len(out), *shape)


def _mean(x: SparseTensor) -> Tensor:
    return global_average(x).to(x.F.dtype)


def _sum(x: SparseTensor) -> Tensor:
    return sum_over_images(x.F, x.coordinate_manager, stride_of(x)).to(x.F.dtype)


def _norm(x: SparseTensor) -> Tensor:
    return sum_over_images(x.F.square(), x.coordinate_manager, stride_of(x)).sqrt().to(x.F.dtype)


def _variance(x: SparseTensor) -> Tensor:
    pyramid, stride = x.coordinate_manager, stride_of(x)
    centred = x.F - spread_over_sites(mean_over_images(x.F, pyramid, stride), pyramid, stride)
    return sum_over_images(centred.square(), pyramid, stride) / (sites_of_images(pyramid, stride) - 1)


def _deviation(x: SparseTensor) -> Tensor:
    return _variance(x).sqrt()


REDUCTIONS: dict[str, Callable[[SparseTensor], Tensor]] = {
    "mean": _mean,
    "sum": _sum,
    "amax": global_maximum,
    "var": _variance,
    "std": _deviation,
    "norm": _norm,
    "vector_norm": _norm,
    "linalg_vector_norm": _norm,
}


@dataclass
class _OfChannels:
    """A function along axes of channels, at every site."""

    call: Call
    shape: tuple[int, ...]
    places: list[int]
    place_of_dim: int
    """Of `dim` among the function's arguments."""

    def __call__(self, x: SparseTensor) -> SparseTensor:
        dim: Any = self.places if len(self.places) > 1 else self.places[0]
        args, kwargs = list(self.call.args[1:]), dict(self.call.kwargs)
        if len(args) >= self.place_of_dim:
            args[self.place_of_dim - 1] = dim
        else:
            kwargs["axis" if "axis" in kwargs else "dim"] = dim
        out = self.call.function(x.F.view(-1, *self.shape), *args, **kwargs)
        return with_features(x, _joined_rows(out))


@_functions("adaptive_avg_pool2d", "adaptive_max_pool2d")
def _pooled(call: Call) -> Compute:
    if not isinstance(call.out, Value) or not call.out.of_images or call.out.axes[2:] != (1, 1):
        raise ValueError(f"gives {call.out}: pools to 1×1 alone")
    reduction = _mean if call.name == "adaptive_avg_pool2d" else global_maximum
    return partial(_reduce, reduction=reduction, shape=call.out.axes[1:])


def _as_module(kind: type[nn.Module], *names: str) -> Rule:
    """A function by the module of the same arguments, without the input."""

    def make(call: Call) -> Compute:
        module = kind(**dict(zip(names, call.args[1:])), **call.kwargs)
        layer, _ = layer_of(module, call.operands[0])
        return layer

    return make


FUNCTIONS["max_pool2d"] = FUNCTIONS["boolean_dispatch"] = _as_module(
    nn.MaxPool2d, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
)
FUNCTIONS["avg_pool2d"] = _as_module(
    nn.AvgPool2d, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
)


@_functions("conv2d")
def _convolved(call: Call) -> Compute:
    weight = call.argument(1, "weight")
    if not isinstance(weight, Value) or not all(isinstance(axis, int) for axis in weight.axes):
        raise ValueError("convolves with weights that depend on the image")
    stride, dilation = call.argument(3, "stride", 1), call.argument(5, "dilation", 1)
    padding = call.argument(4, "padding", 0)
    make: Any = same_window if padding == "same" else partial(window_of, before=0 if padding == "valid" else padding)
    window = partial(make, size=weight.axes[2:], stride=stride, dilation=dilation)
    window(1)
    return partial(_convolve, window=window, groups=call.argument(6, "groups", 1))


def _convolve(
    x: SparseTensor, weight: Tensor, bias: Tensor | None = None, *, window: Callable[[int], Window], groups: int
) -> SparseTensor:
    return convolve(x, weight, bias, window(stride_of(x)), groups)


@_functions("linear")
def _linear(call: Call) -> Compute:
    require_channels_last(call.operands[0])
    return _linear_of_rows


def _linear_of_rows(x: SparseTensor, weight: Tensor, bias: Tensor | None = None) -> SparseTensor:
    return with_features(x, functional.linear(x.F, weight, bias))


@_functions("layer_norm")
def _layer_norm(call: Call) -> Compute:
    require_channels_last(call.operands[0])
    shape, eps = call.argument(1, "normalized_shape"), call.argument(4, "eps", 1e-5)
    return partial(_normalise_rows, shape=list(shape), eps=eps)


def _normalise_rows(
    x: SparseTensor, weight: Tensor | None = None, bias: Tensor | None = None, *, shape: list[int], eps: float
) -> SparseTensor:
    return with_features(x, functional.layer_norm(x.F, shape, weight, bias, eps))


@_functions("getattr", "size", "dim", "ndimension")
def _described(call: Call) -> Compute:
    """What the dense network would read of a map's shape and kind."""
    axes, name = call.operands[0].axes, call.args[1] if call.name == "getattr" else call.name
    if name in ("shape", "size"):
        return partial(_shape, axes=axes, place=call.argument(1, "dim") if name == "size" else None)
    if name in ("dim", "ndimension", "ndim"):
        return partial(_number, value=len(axes))
    if name in ("dtype", "device"):
        return partial(_feature_attribute, name=name)
    raise ValueError(f"reads .{name}")


def _shape(x: SparseTensor, axes: Sequence[Any], place: int | None) -> Any:
    images, height, width = x.coordinate_manager.extent(stride_of(x))
    lengths = {"B": images, "H": height, "W": width, "HW": height * width}
    shape = torch.Size(lengths.get(axis, axis) for axis in axes)
    return shape if place is None else shape[place]


def _number(x: SparseTensor, value: int) -> int:
    return value


def _feature_attribute(x: SparseTensor, name: str) -> Any:
    return getattr(x.F, name)
