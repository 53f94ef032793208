"""What the modules of dense networks mean on rows of sites: the table, torch's modules, and those of its libraries.

A map [B, C, H, W] of a dense network, or [B, H, W, C], or with several axes of channels, is features [N, C] here, with
all channels of a site in a row; how they lie in the dense network's axes is known from its trace. What a network
computes for each image ([B, C, 1, 1] behind an average) and its parameters stay dense tensors.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from spark_me.errors import UserError
from spark_me.sparse.images import global_average, global_maximum, mean_over_images, scale_images
from spark_me.sparse.layers import AvgPool2d, Conv2d, DropPath, MaxPool2d, Padded, average_pool, convolve, window_of
from spark_me.sparse.neighbours import Window
from spark_me.sparse.norms import BatchNorm2d, GlobalResponseNorm, GroupNorm, InstanceNorm2d, LayerNorm, centre_images
from spark_me.sparse.tensor import SparseTensor, at_stride, stride_of, with_features
from spark_me.trace import LEAVES, LIBRARY_LEAVES, Value, leaf_type, library_types

Builder = Callable[[Any], nn.Module]
Kind = TypeVar("Kind", bound=type[nn.Module])

MODULES: dict[type[nn.Module], Builder] = {}
"""From a module's type to what makes the sparse layer of it."""
AT_EVERY_SITE: set[type[nn.Module]] = set()
"""Modules that compute each row [C] by itself: they are applied to the rows as they are."""


def rule(*kinds: type[nn.Module]) -> Callable[[Kind], Kind]:
    """Declare the sparse layer of dense modules: a class whose `forward` maps a `SparseTensor` to another one.

        @sparse.rule(MyLayer)
        class SparseMyLayer(MyLayer):
            def forward(self, x: sparse.SparseTensor) -> sparse.SparseTensor: ...

    A layer has all attributes of the module that it stands for, its very parameters and buffers among them: its
    `__init__` does not run. A method `check()`, if it has one, refuses with a ValueError what it cannot compute.

    Args:
        kinds: types of dense modules; classes that inherit their `forward` are meant too.
    """

    def register(layer: Kind) -> Kind:
        for kind in kinds:
            MODULES[kind] = partial(from_dense, layer)
            LEAVES.add(kind)
        return layer

    return register


def at_every_site(*kinds: type[nn.Module]) -> None:
    """Declare modules that compute each site by itself, from its channels on the last axis."""
    AT_EVERY_SITE.update(kinds)
    LEAVES.update(kinds)


Padding = tuple[tuple[int, int], tuple[int, int]]
"""Places before and behind a map, each (down, across)."""


def padding_of(value: Value, args: Sequence[Any], kwargs: dict[str, Any]) -> Padding:
    """Where `torch.nn.functional.pad` adds zeros to a map.

    Raises:
        ValueError: for other padding than zeros around a map.
    """
    options = dict(zip(("pad", "mode", "value"), args)) | kwargs
    left, right, top, bottom = [*options["pad"], 0, 0, 0, 0][:4]
    fill = options.get("value") or 0
    if not value.is_image_map or len(options["pad"]) > 4 or options.get("mode", "constant") != "constant" or fill:
        raise ValueError(f"pads {shown_axes(value)} by {options}: only zeros around a map have a meaning")
    return (top, left), (bottom, right)


def from_dense(layer: type[nn.Module], module: nn.Module) -> nn.Module:
    """A layer with the attributes, parameters and buffers of a module.

    Raises:
        ValueError: if the layer cannot compute what the module does.
    """
    twin = layer.__new__(layer)
    nn.Module.__init__(twin)
    shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
    for name, value in module.__dict__.items():
        if name in shared or name not in twin.__dict__:  # hooks are for dense tensors
            twin.__dict__[name] = value.copy() if isinstance(value, dict | set) else value
    check: Any = getattr(twin, "check", None)
    if check is not None and not isinstance(twin, Padded):  # those are looked at when their padding is known
        check()
    return twin


def layer_of(
    module: nn.Module, value: Value, around: Padding | None = None
) -> tuple[nn.Module, Callable[..., Any] | None]:
    """The sparse layer of a module, and what calls it on a sparse tensor; None: the layer itself does.

    Args:
        module: of a dense network.
        value: what it is given.
        around: zeros that were added to that.

    Raises:
        ValueError: if there is none, or it cannot compute what the module does.
    """
    kind = leaf_type(type(module))
    if kind in MODULES:
        if isinstance(module, nn.Conv2d | nn.modules.batchnorm._BatchNorm) and not value.is_image_map:
            raise ValueError(f"takes maps [B, C, H, W], not {shown_axes(value)}")
        if type(module) is nn.LayerNorm:
            require_channels_last(value)
        layer: Any = MODULES[kind](module)
        if around is not None:
            if not isinstance(layer, Padded):
                raise ValueError("reads a map that is padded with zeros")
            layer.around = around
        if isinstance(layer, Padded):
            layer.check()
        return layer, None
    if around is not None:
        raise ValueError("reads a map that is padded with zeros")
    if kind in AT_EVERY_SITE:
        if isinstance(module, nn.Linear | nn.LayerNorm):
            require_channels_last(value)
        return module, rowwise
    raise ValueError("has no rule")


def require_channels_last(value: Value) -> None:
    if not isinstance(value.axes[-1], int):
        raise ValueError(f"takes maps [B, H, W, C], not {shown_axes(value)}")


def shown_axes(value: Value) -> str:
    return f"[{', '.join(map(str, value.axes))}]"


def rowwise(module: Callable[..., Tensor], x: SparseTensor) -> SparseTensor:
    """A module of dense networks on the rows as they are."""
    return with_features(x, module(x.F))


# Modules of torch. Convolution: empty neighbours are zero. Batch norm: statistics of visible sites. Max pooling: empty
# sites are ignored; average pooling: they count in neither sum nor number. Group and instance norm: statistics of each
# image's visible sites. Dropout draws for every site and channel.
rule(nn.Conv2d)(Conv2d)
rule(nn.BatchNorm2d)(BatchNorm2d)
rule(nn.MaxPool2d)(MaxPool2d)
rule(nn.AvgPool2d)(AvgPool2d)
rule(nn.LayerNorm)(LayerNorm)
rule(nn.GroupNorm)(GroupNorm)
rule(nn.InstanceNorm2d)(InstanceNorm2d)
at_every_site(
    nn.Identity, nn.Linear, nn.Dropout, nn.AlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU,
    nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip


class GlobalAverage(nn.AdaptiveAvgPool2d):
    """The mean of each image's visible sites: [B, C, 1, 1]."""

    def forward(self, x: SparseTensor) -> Tensor:
        return global_average(x).to(x.F.dtype)[:, :, None, None]

    def check(self) -> None:
        """Refuse pooling to other sizes.

        Raises:
            ValueError: for one.
        """
        if self.output_size not in (1, (1, 1), [1, 1]):
            raise ValueError(f"pools to {self.output_size}: to 1×1 alone")


class GlobalMaximum(GlobalAverage):
    """The maximum of each image's visible sites: [B, C, 1, 1]."""

    def forward(self, x: SparseTensor) -> Tensor:
        return global_maximum(x)[:, :, None, None]


rule(nn.AdaptiveAvgPool2d)(GlobalAverage)
rule(nn.AdaptiveMaxPool2d)(GlobalMaximum)


@rule(nn.Dropout2d)
class Dropout2d(nn.Dropout2d):
    """Drops whole channels of an image."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        pyramid, stride = x.coordinate_manager, stride_of(x)
        ones = x.F.new_ones(len(pyramid.visible), x.F.shape[1])
        kept = functional.dropout(ones, self.p, self.training)
        return with_features(x, scale_images(x.F, kept, pyramid, stride))


def _activated(norm: Any, x: SparseTensor) -> SparseTensor:
    """Dropout and activation behind a norm of timm's."""
    return rowwise(norm.act, rowwise(norm.drop, x))


class BatchNormAct2d(BatchNorm2d):
    """timm's batch norm with an activation: statistics of the visible sites."""

    def forward(self, x: SparseTensor, *_: Any) -> SparseTensor:
        if type(self.act) is nn.ReLU and type(self.drop) is nn.Identity:
            return super().forward(x, relu=True)
        return _activated(self, super().forward(x))


class GroupNormAct(GroupNorm):
    """timm's group norm with an activation: statistics of each image's visible sites."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return _activated(self, super().forward(x))


class LayerNormAct(LayerNorm):
    """timm's layer norm with an activation: of each site."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return _activated(self, super().forward(x))


class EvoNorm2dS0a(nn.Module):
    """timm's EvoNorm S0: x·sigmoid(v·x) divided by the deviation of x in each image's groups of channels."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        me: Any = self
        _, variance = centre_images(x, me.groups)
        rows = x.F if me.v is None else x.F * (x.F * me.v).sigmoid()
        rows = scale_images(rows, (variance + me.eps).rsqrt(), x.coordinate_manager, stride_of(x))
        return with_features(x, rows * me.weight + me.bias)


class EvoNorm2dS0(EvoNorm2dS0a):
    """As timm has it, without an activation it divides by nothing."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        me: Any = self
        return super().forward(x) if me.v is not None else with_features(x, x.F * me.weight + me.bias)


class FilterResponseNorm2d(nn.Module):
    """timm's filter response norms: divided by the root mean square of each image's channels, then an activation."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        me: Any = self
        pyramid, stride = x.coordinate_manager, stride_of(x)
        squares = mean_over_images(x.F.square(), pyramid, stride)
        rows = scale_images(x.F, (squares + me.eps).rsqrt(), pyramid, stride) * me.weight + me.bias
        if hasattr(me, "act"):
            return with_features(x, me.act(rows))
        return with_features(x, rows if me.tau is None else rows.maximum(me.tau))


class FrozenBatchNorm2d(nn.Module):
    """A batch norm whose statistics never change: a factor and a constant for each channel."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        me: Any = self
        scale = me.weight * (me.running_var + me.eps).rsqrt()
        out = with_features(x, x.F * scale + (me.bias - me.running_mean * scale))
        return _activated(self, out) if hasattr(me, "act") else out


class Same(Padded):
    """timm's "same" padding, whose odd place lies behind the map."""

    def window(self, in_stride: int) -> Window:
        return self.same_window(in_stride)


class SameConv2d(Same, Conv2d):
    """timm's convolution with "same" padding."""


class StandardisedConv2d(Conv2d):
    """timm's convolution whose kernels are standardised, to mean 0 and deviation 1, and scaled by its gain if any."""

    def window(self, in_stride: int) -> Window:
        if getattr(self, "same_pad", False):
            return self.same_window(in_stride)
        return super().window(in_stride)

    def forward(self, x: SparseTensor) -> SparseTensor:
        me: Any = self
        gain = (me.gain * me.scale).view(-1) if hasattr(me, "gain") else None
        kernels = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(kernels, None, None, gain, training=True, momentum=0.0, eps=me.eps)
        weight = weight.reshape_as(self.weight)
        return convolve(x, weight, self.bias, self.window(stride_of(x)), self.groups)


class SameMaxPool2d(Same, MaxPool2d):
    """timm's max pooling with "same" padding."""


class SameAvgPool2d(Same, AvgPool2d):
    """timm's average pooling with "same" padding, which counts as sites."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        window = self.window(stride_of(x))
        behind = [span - step - near for span, step, near in zip(window.span, [window.stride] * 2, window.before)]
        return average_pool(x, window, (max(behind[0], 0), max(behind[1], 0)))


class BlurPool2d(nn.Module):
    """timm's anti-aliased downsampling: the weighted mean of the visible sites under its filter.

    Beyond the map the sites inside are mirrored, or zeros count as sites, as the dense module has it.
    """

    filt: Tensor
    filt_size: int
    stride: int
    padding: list[int]
    pad_mode: str

    def forward(self, x: SparseTensor) -> SparseTensor:
        left, right, top, bottom = self.padding
        window = window_of(stride_of(x), self.filt_size, self.stride, 1, (top, left), (bottom, right))
        neighbours = x.coordinate_manager.neighbours
        if self.pad_mode == "reflect":
            table = neighbours.mirrored(window)
            counted = table < len(x.F)
        else:
            table = neighbours.inputs_of_outputs(window)
            counted = (table < len(x.F)) | neighbours.outside(window)
        # the engine numbers offsets with y first
        weights = self.filt[0, 0].t().flatten().to(x.F.dtype)
        rows = functional.pad(x.F, (0, 0, 0, 1))
        blurred = rows.new_zeros(table.shape[1], rows.shape[1])
        for inputs, weight in zip(table, weights):
            blurred = blurred + rows.index_select(0, inputs) * weight
        return at_stride(x, window.out_stride, blurred / (counted.to(weights.dtype).t() @ weights)[:, None])

    def check(self) -> None:
        """Refuse other padding than by reflection and by zeros.

        Raises:
            ValueError: for another mode.
        """
        if self.pad_mode not in ("reflect", "constant"):
            raise ValueError(f"pad_mode={self.pad_mode!r}: must be 'reflect' or 'constant'")


def _drop_path(module: Any) -> nn.Module:
    return DropPath(module.drop_prob or 0.0, module.scale_by_keep)


def _stochastic_depth(module: Any) -> nn.Module:
    return DropPath(module.p, per_image=module.mode == "row")


LIBRARY_RULES: dict[str, Any] = {
    "AvgPool2dSame": SameAvgPool2d,
    "BatchNormAct2d": BatchNormAct2d,
    "BlurPool2d": BlurPool2d,
    "Conv2dSame": SameConv2d,
    "DropPath": _drop_path,
    "EvoNorm2dS0": EvoNorm2dS0,
    "EvoNorm2dS0a": EvoNorm2dS0a,
    "FilterResponseNormAct2d": FilterResponseNorm2d,
    "FilterResponseNormTlu2d": FilterResponseNorm2d,
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "FrozenBatchNormAct2d": FrozenBatchNorm2d,
    "GlobalResponseNorm": GlobalResponseNorm,
    "GroupNorm": GroupNorm,
    "GroupNorm1": GroupNorm,
    "GroupNormAct": GroupNormAct,
    "LayerNorm": LayerNorm,
    "LayerNorm2d": LayerNorm,
    "LayerNormAct": LayerNormAct,
    "LayerNormAct2d": LayerNormAct,
    "MaxPool2dSame": SameMaxPool2d,
    "ScaledStdConv2d": StandardisedConv2d,
    "ScaledStdConv2dSame": StandardisedConv2d,
    "StdConv2d": StandardisedConv2d,
    "StdConv2dSame": StandardisedConv2d,
    "StochasticDepth": _stochastic_depth,
}
"""Of the classes in `spark_me.trace.LIBRARY_LEAVES` that have a meaning on sites."""


def library_rules() -> None:
    """Register the rules of torchvision's and timm's modules, where these libraries are installed."""
    for name, kind in library_types(LIBRARY_LEAVES):
        if name in LIBRARY_RULES:
            layer = LIBRARY_RULES[name]
            MODULES.setdefault(kind, partial(from_dense, layer) if isinstance(layer, type) else layer)


def refusal(place: str, reason: str, network: str) -> UserError:
    """What is said of an operation that cannot be computed on sites."""
    return UserError(
        f"{network} cannot become sparse: {place}: {reason}. Take it out of the network, or declare what it means on "
        "sites (spark_me.sparse.rule)"
    )
