"""Masking by simulation: any dense convnet, computed as if hidden patches did not exist.

The network's own forward runs as it is; torch's functions get their meaning on visible positions while it does. This
is how other implementations compute it, at full dense cost: the oracle of the tests and the baseline of the benchmark.

Functions that treat each position by itself run as they are, so a hidden position may hold anything until a function
reads its neighbours. Those that are known to do so are in `_Masking._meanings` and `_REDUCTIONS`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spark_me.masking import upsample_visible

_REDUCTIONS = dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "softmax"), 1)
_REDUCTIONS |= dict.fromkeys(("norm", "linalg_vector_norm"), 2)
"""Functions over some dimensions, and the place of `dim` among their arguments."""

_FILL = {"amax": -math.inf, "amin": math.inf, "softmax": -math.inf}
"""What such a function ignores, where that is not zero."""

_PERMUTATIONS = {"permute", "transpose", "movedim", "swapaxes"}
_ZERO_TO_ZERO = _PERMUTATIONS | {
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "gelu", "silu", "hardswish", "mish", "elu", "selu", "celu",
    "tanh", "abs", "neg", "square", "dropout", "dropout2d", "div", "clone", "detach", "to", "float", "double", "half",
    "bfloat16", "type_as", "contiguous", "view", "reshape", "flatten", "unflatten", "unsqueeze", "chunk", "split",
    "getitem",
}  # fmt: skip
_SUMS = {"add", "sub", "cat", "concat", "stack"}
_PRODUCTS = {"mul", "multiply"}
"""Functions that are zero where their first input is, where all inputs are, where one is and the others are finite."""


class MaskedDense(nn.Module):
    """A dense convnet with an explicit mask."""

    def __init__(self, network: nn.Module, taps: Sequence[tuple[str, int]]) -> None:
        """
        Args:
            network: the convnet; its parameters are this module's, below `network.`.
            taps: (path, stride) of every map to return: the last one of this stride that the forward of the module
                `path` itself computed, or that it returned. "" is the network.
        """
        super().__init__()
        self.network = network
        self.taps = tuple(taps)
        self._masking: _Masking | None = None
        # Once and for all, as a compiler follows no hooks that come and go.
        for module in network.modules():
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def forward(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """Images [B, C, H, W] and visible bool [B, fh, fw] → the maps [B, C_i, H/s_i, W/s_i], zero where hidden."""
        modules = [(self.network.get_submodule(path), images.shape[2] // stride) for path, stride in self.taps]
        masking = _Masking(visible, modules)
        if masking.dims_of(images) != (2, 3):
            raise ValueError(f"images {tuple(images.shape)} are no multiple of the mask {tuple(visible.shape)}")
        images = masking.zero_hidden(images)
        self._masking = masking
        try:
            with masking:
                self.network(images)
        finally:
            self._masking = None
        for x, (path, stride) in zip(masking.tapped, self.taps):
            if x is None:
                raise LookupError(f"no map of stride {stride} in the forward of {path or 'the network'!r}")
        return masking.tapped_maps()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self._masking is not None:
            self._masking.forwards.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._masking is not None:
            self._masking.forwards.pop()
            self._masking.tap(module, output)


class _Known(NamedTuple):
    """What is known of a tensor: its attribute `_masking`."""

    visible: Tensor
    """The mask that it is known under."""
    dims: tuple[int, ...] | None
    """Its dimensions of positions, as `_Masking.dims_of`."""
    zero_at: int
    """The tensor's version when its hidden positions were zero, −1 for never."""
    padded: Tensor | None
    """Of a padded map, which is no map any more: its hidden positions as numbers [B, 1, h, w]."""


class _Masking(TorchFunctionMode):
    """Gives torch's functions their meaning on visible positions.

    A map is a tensor of B images whose positions are a multiple of the mask's grid, the same one in both directions.
    """

    def __init__(self, visible: Tensor, taps: Sequence[tuple[nn.Module, int]]) -> None:
        """`taps` are modules and the heights of their maps."""
        super().__init__()
        self.visible = visible
        self.taps = taps
        self.tapped: list[Tensor | None] = [None] * len(taps)
        self.forwards: list[nn.Module] = []  # those that run, the innermost last
        self._hidden: dict[int, Tensor] = {}
        self._meanings: dict[Any, Callable[..., Any]] = {
            functional.conv2d: self._conv2d,
            functional.pad: self._pad,
            functional.batch_norm: self._batch_norm,
            functional.group_norm: self._group_norm,
            functional.instance_norm: self._instance_norm,
            functional.max_pool2d: self._max_pool2d,
            functional.avg_pool2d: self._avg_pool2d,
            functional.adaptive_avg_pool2d: self._adaptive_avg_pool2d,
            functional.adaptive_max_pool2d: self._adaptive_max_pool2d,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":  # an attribute, mostly the shape
            return func(*args, **kwargs)
        if not args and "input" in kwargs:
            args = (kwargs["input"],)
            kwargs = {key: value for key, value in kwargs.items() if key != "input"}
        x: Any = args[0] if args else None
        if name.endswith("_") or "inplace" in kwargs or any(value is True for value in args):
            self._keep_tapped(x)
        dims = self.dims_of(x)
        if func in self._meanings and (dims is not None and dims[-1] == x.dim() - 1 or self._padded(x) is not None):
            out = self._meanings[func](*args, **kwargs)
        elif dims is not None and name in _REDUCTIONS and self._reduces_positions(name, dims, args, kwargs):
            out = self._reduce(func, dims, args, kwargs)
        elif func in self._meanings and self._is_misfit(x):
            raise NotImplementedError(f"{name} of {tuple(x.shape)}, which is no multiple of the mask")
        else:
            inputs = list(_tensors(args))
            zero = self._leaves_zero(name.strip("_"), args, inputs)  # asked first: it may be in place
            out = func(*args, **kwargs)
            self._learn(func, args, kwargs, inputs, out, zero)
        if self.forwards:
            self.tap(self.forwards[-1], out)
        return out

    def dims_of(self, x: Any) -> tuple[int, ...] | None:
        """A map's dimensions of positions: two that follow each other, or one where they are flattened.

        They are the last two if nothing else is known.
        """
        known = self._known(x)
        if known is not None:
            return known.dims
        if not isinstance(x, Tensor) or x.dim() < 4 or isinstance(x, nn.Parameter):
            return None
        images, height, width = self.visible.shape
        factor = x.shape[-2] // height
        fits = factor > 0 and (len(x), *x.shape[-2:]) == (images, height * factor, width * factor)
        return (x.dim() - 2, x.dim() - 1) if fits else None

    def _is_misfit(self, x: Tensor) -> bool:
        """Whether a tensor must be a map but for its size; also what is padded where a compiler hides the padding."""
        images, height, width = self.visible.shape
        if x.dim() != 4 or len(x) != images or self._known(x) is not None:
            return False
        return x.shape[2] > height or x.shape[3] > width

    def hidden_of(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """The hidden positions of a map: bool, of as many dimensions as the map, of size 1 where it says nothing."""
        factor = round((_size(x, dims) / self.visible[0].numel()) ** 0.5)
        if factor not in self._hidden:
            self._hidden[factor] = ~upsample_visible(self.visible, factor)
        return self._hidden[factor].view([size if dim in (0, *dims) else 1 for dim, size in enumerate(x.shape)])

    def zero_hidden(self, x: Tensor) -> Tensor:
        """A map with zeros at hidden positions; another tensor as it is."""
        dims = self.dims_of(x)
        if dims is None or self._is_zero(x):
            return x
        x = x.masked_fill(self.hidden_of(x, dims), 0)
        self._note(x, dims, zero=True)
        return x

    def tap(self, module: nn.Module, out: Any) -> None:
        """Keep the maps that a module computed or returned, if they are asked for."""
        for place, (tapped, height) in enumerate(self.taps):
            if module is tapped:
                for x in _tensors(out):
                    dims = self.dims_of(x)
                    if x.dim() == 4 and dims is not None and x.shape[dims[0]] == height:
                        self.tapped[place] = x

    def tapped_maps(self) -> list[Tensor]:
        maps = [self.zero_hidden(x) for x in self.tapped if x is not None]
        return [x.permute(0, 3, 1, 2) if self.dims_of(x) == (1, 2) else x for x in maps]

    def _keep_tapped(self, changed: Any) -> None:
        """Save a tapped map from a function that may change its input."""
        for place, x in enumerate(self.tapped):
            if x is not None and changed is x:
                self.tapped[place] = x.clone()
                self._note(self.tapped[place], self.dims_of(x), self._is_zero(x))

    # What is known of tensors

    def _known(self, x: Any) -> _Known | None:
        known = getattr(x, "_masking", None)
        return known if known is not None and known.visible is self.visible else None

    def _note(self, x: Any, dims: tuple[int, ...] | None, zero: bool = False, padded: Tensor | None = None) -> None:
        x._masking = _Known(self.visible, dims, _version(x) if zero else -1, padded)

    def _is_zero(self, x: Tensor) -> bool:
        """Whether hidden positions are known to be zero; a change in place, if only through a view, unsettles it."""
        known = self._known(x)
        return known is not None and known.zero_at == _version(x)

    def _padded(self, x: Any) -> Tensor | None:
        known = self._known(x)
        return None if known is None else known.padded

    def _leaves_zero(self, name: str, args: Any, inputs: Sequence[Tensor]) -> bool:
        """Whether a function that runs as it is leaves hidden positions zero."""
        if name == "hardtanh" and not _holds_zero(*args[1:3]):
            return False
        if name in _ZERO_TO_ZERO:
            return len(inputs) > 0 and self._is_zero(inputs[0])
        if name in _SUMS:
            return all(map(self._is_zero, inputs)) and not any(isinstance(x, (int, float)) for x in args[:2])
        return name in _PRODUCTS and any(map(self._is_zero, inputs))

    def _learn(self, func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor], out: Any, zero: bool) -> None:
        """Note what the output of a function has from its inputs."""
        source = next((x for x in inputs if self.dims_of(x) is not None), None)
        before = self.dims_of(source)
        if source is None or before is None:
            return
        for x in _tensors(out):
            dims = self.dims_of(x)
            if func.__name__ in _PERMUTATIONS:
                sizes = torch.empty(list(range(x.dim())), device="meta")  # whose sizes name its dimensions
                order = list(func(sizes, *args[1:], **kwargs).shape)
                dims = tuple(sorted(order.index(dim) for dim in before))
            elif x.dim() == source.dim() and [x.shape[dim] for dim in before] == [source.shape[dim] for dim in before]:
                dims = before
            elif x.dim() == 3 and source.dim() == 4 and x.shape[before[0]] == _size(source, before):
                dims = before[:1]  # flattened
            if dims is not None:
                self._note(x, dims, zero and _size(x, dims) == _size(source, before))

    # The meanings of functions

    def _mean(self, mean: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A mean of positions, by whatever weights, as if it had been taken over visible ones alone."""
        dims = self.dims_of(x)
        hidden = self._padded(x) if dims is None else self.hidden_of(x, dims).double()
        assert hidden is not None
        share = 1 - mean(hidden)
        share = share.masked_fill(share < 1e-9, 1)  # nothing is visible: the mean is zero
        return self.zero_hidden(mean(self.zero_hidden(x)) / share.to(x.dtype))

    def _reduces_positions(self, name: str, dims: tuple[int, ...], args: Any, kwargs: Any) -> bool:
        over = _reduced(name, args, kwargs).intersection(dims)
        if over and len(over) < len(dims) and name != "softmax":
            raise NotImplementedError(f"{name} over one of the two dimensions of a map")
        return len(over) == len(dims)

    def _reduce(self, func: Any, dims: tuple[int, ...], args: Any, kwargs: Any) -> Any:
        name: str = func.__name__
        x, rest = args[0], list(args[1:])
        hidden = self.hidden_of(x, dims)
        if name == "mean":
            return self._mean(lambda y: func(y, *rest, **kwargs), x)
        if name not in ("var", "std", "var_mean", "std_mean"):
            filled = x.masked_fill(hidden, _FILL[name]) if name in _FILL else self.zero_hidden(x)
            return func(filled, *rest, **kwargs)
        over = sorted(_reduced(name, args, kwargs))
        unbiased, keepdim = (list(rest[1:]) + [True, False][len(rest[1:]) :])[:2]
        mean, variance, count = _moments(x, hidden, over)
        correction = kwargs.get("correction", int(kwargs.get("unbiased", unbiased)))
        variance = variance * count / (count - correction)
        if not kwargs.get("keepdim", keepdim):
            mean, variance = mean.squeeze(over), variance.squeeze(over)
        spread = variance.sqrt() if "std" in name else variance
        return (spread, mean) if "mean" in name else spread

    def _conv2d(
        self, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:  # fmt: skip
        size, options = tuple(weight.shape[2:]), (stride, padding, dilation)
        if self.forwards and type(self.forwards[-1]).__name__ == "BlurPool2d":  # timm's: a fixed depthwise filter
            return self._mean(
                lambda y: functional.conv2d(y, weight[: y.shape[1]].to(y.dtype), None, *options, y.shape[1]), x
            )
        # Windows of these stay within a patch: what is hidden reaches hidden positions alone.
        if size != (1, 1) and (size, (0, 0), (1, 1)) != (_pair(stride), _pair(padding), _pair(dilation)):
            x = self.zero_hidden(x)
        return functional.conv2d(x, weight, bias, *options, groups)

    def _pad(self, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
        dims = self.dims_of(x)
        if dims is None:
            return functional.pad(x, pad, mode, value)
        # Hidden positions get what the border gets: a pooling that ignores the one ignores the other.
        x = x.masked_fill(self.hidden_of(x, dims), value) if value else self.zero_hidden(x)
        out = functional.pad(x, pad, mode, value)
        if not any(pad[:4]):  # channels alone
            self._note(out, dims, zero=not value)
        else:
            self._note(out, None, padded=functional.pad(self.hidden_of(x, dims).double(), pad[:4], mode))
        return out

    def _batch_norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.hidden_of(x, (2, 3))
        if torch.compiler.is_compiling():
            return self.zero_hidden(_batch_norm_of_maps(x, hidden, *args, **kwargs))
        mask = ~hidden[:, 0]
        rows = functional.batch_norm(x.permute(0, 2, 3, 1)[mask], *args, **kwargs)  # [N, C]
        out = _Scatter.apply(rows, mask)
        self._note(out, (2, 3), zero=True)
        return out

    def _group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        dims = self.dims_of(x)
        assert dims is not None
        grouped = x.unflatten(1, (num_groups, -1))  # [B, G, C/G, h, w]
        over = list(range(2, grouped.dim()))
        mean, variance, _ = _moments(grouped, self.hidden_of(x, dims).unsqueeze(1), over)
        out = ((grouped - mean) * torch.rsqrt(variance + eps)).flatten(1, 2)
        return _affine(out, weight, bias)

    def _instance_norm(
        self, x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
        use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if running_mean is not None:
            raise NotImplementedError("instance norm with running statistics")
        return self._group_norm(x, x.shape[1], weight, bias, eps)

    def _max_pool2d(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.zero_hidden(functional.max_pool2d(self._without_hidden(x), *args, **kwargs))

    def _avg_pool2d(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (args[5] if len(args) > 5 else kwargs.get("divisor_override")) is not None:
            return self.zero_hidden(functional.avg_pool2d(self.zero_hidden(x), *args, **kwargs))
        return self._mean(lambda y: functional.avg_pool2d(y, *args, **kwargs), x)

    def _adaptive_avg_pool2d(self, x: Tensor, output_size: Any) -> Tensor:
        if _pair(output_size) != (1, 1):  # the head of a classifier: no map any more
            out = functional.adaptive_avg_pool2d(x, output_size)
            self._note(out, None)
            return out
        return self._mean(lambda y: functional.adaptive_avg_pool2d(y, 1), x)

    def _adaptive_max_pool2d(self, x: Tensor, output_size: Any, return_indices: Any = False) -> Any:
        filled = self._without_hidden(x) if _pair(output_size) == (1, 1) else x
        return functional.adaptive_max_pool2d(filled, output_size, return_indices)

    def _without_hidden(self, x: Tensor) -> Tensor:
        """For a maximum."""
        dims, padded = self.dims_of(x), self._padded(x)
        hidden = self.hidden_of(x, dims) if dims is not None else padded.bool() if padded is not None else None
        return x if hidden is None else x.masked_fill(hidden, -math.inf)


class _Scatter(torch.autograd.Function):
    """Rows [N, C] at the N places of a mask [B, h, w] → [B, C, h, w], zero elsewhere.

    By indexing it would be a view, and an activation of that in place costs several copies.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        images, height, width = mask.shape
        size = (images, rows.shape[1], height, width)
        dense = torch.empty(size, dtype=rows.dtype, device=rows.device, memory_format=torch.channels_last).zero_()
        dense.permute(0, 2, 3, 1)[mask] = rows
        return dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradients[0].permute(0, 2, 3, 1)[mask], None


def _batch_norm_of_maps(
    x: Tensor, hidden: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Batch norm without rows, whose number depends on the mask: for a compiler, which makes few kernels of it."""
    if not training:
        return functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    features = x if running_mean is None else x.to(running_mean.dtype)
    mean, variance, sites = _moments(features, hidden, [0, 2, 3])
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.flatten(), momentum)
            running_var.lerp_((variance * sites / (sites - 1)).flatten(), momentum)
    return _affine((features - mean) * torch.rsqrt(variance + eps), weight, bias).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [-1] + [1] * (x.dim() - 2)
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _moments(x: Tensor, hidden: Tensor, over: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over visible positions, and of how many numbers; all keep their dimensions."""
    count = (~hidden).sum(over, keepdim=True) * _size(x, [dim for dim in over if hidden.shape[dim] == 1])
    mean = x.masked_fill(hidden, 0).sum(over, keepdim=True) / count
    variance = (x - mean).masked_fill(hidden, 0).square().sum(over, keepdim=True) / count
    return mean, variance, count


def _reduced(name: str, args: Any, kwargs: Any) -> set[int]:
    """The dimensions that a function of `_REDUCTIONS` reduces."""
    place, dimensions = _REDUCTIONS[name], args[0].dim()
    over = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
    if over is None or isinstance(over, bool) or over == ():
        return set(range(dimensions))
    return {dim % dimensions for dim in ([over] if isinstance(over, int) else over)}


def _tensors(values: Any) -> Iterator[Tensor]:
    """A tensor, or those of a list or tuple and of the lists and tuples in it."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _size(x: Tensor, dims: Sequence[int]) -> int:
    return math.prod([x.shape[dim] for dim in dims])


def _version(x: Tensor) -> int:
    """How often a tensor, or one that it shares memory with, was changed in place."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _pair(value: Any) -> tuple[Any, ...]:
    """What torch's functions take for two numbers: one, or a sequence of one or two."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * 2 if len(values) == 1 else values


def _holds_zero(low: float = -1.0, high: float = 1.0) -> bool:
    return low <= 0 <= high
