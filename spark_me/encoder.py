"""Any dense convnet as a sparse encoder: the same network, computed at visible sites only.

The network is traced (`spark_me.trace`) and translated node by node by the rules of `spark_me.sparse`. Nothing of
it is written anew: modules, names and parameters are its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter, getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from spark_me import sparse
from spark_me.sparse import SparseTensor
from spark_me.sparse.rules import functions, modules
from spark_me.trace import Trace, Value, normalises_by_layer, path_of, place_of, trace

INPUT = 0
"""The number of the sparse image among the results."""
STEPS_OF_SEGMENT = 6
"""Steps that gradient checkpointing recomputes together, at least: about a residual block."""


@dataclass(frozen=True)
class Result:
    """Stands for the result of a step among the arguments of another."""

    step: int


@dataclass(frozen=True)
class Attribute:
    """Stands for a layer, parameter or buffer among the arguments of a step."""

    path: str


@dataclass(frozen=True)
class Step:
    """One operation of an encoder.

    Attributes:
        result: its number, by which others refer to it.
        layer: path of the module that computes it; None of a function.
        function: what computes it; of a layer, what calls that on its arguments (None: itself).
        args, kwargs: its arguments.
        last_uses: results that nothing needs after it.
    """

    result: int
    layer: str | None
    function: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    last_uses: tuple[int, ...] = ()

    def operands(self) -> set[int]:
        """Numbers of the steps whose results it takes."""
        found: set[int] = set()
        map_aggregate((self.args, self.kwargs), lambda each: found.add(each.step) if isinstance(each, Result) else None)
        return found


class Segment(NamedTuple):
    """Steps that follow each other; gradient checkpointing recomputes them together.

    Attributes:
        steps: about as many as a residual block has.
        inputs: earlier results that they take.
        results: of theirs, what later ones or the caller take.
        kept: all results that are still needed after them.
    """

    steps: list[Step]
    inputs: tuple[int, ...]
    results: tuple[int, ...]
    kept: frozenset[int]


class Container(nn.Module):
    """A module of the author's that is only a place for others: it has no computation of its own here."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _get_name(self) -> str:
        return self._name


class SparseEncoder(nn.Module):
    """A dense convnet on sparse tensors, without what follows its last map.

    Its parameters and buffers are the dense network's own objects, by the same names: its state dict loads into it.

    Attributes:
        network: the dense network's name, or that of its class.
        strides: of the feature scales, shallow to deep: each half of the next, the last is the total stride.
        channels: of the feature scales.
        taps: where the dense network computes the scales, see `spark_me.trace.Trace`.
        total_stride: the patch size P that masks need; a power of two.
        densify_norm: from a number of channels, the norm that densifying applies to each feature scale.
        checkpointing: whether parts keep only their inputs for the backward pass, for less memory and more time.
    """

    checkpointing: bool = False

    def __init__(self, traced: Trace) -> None:
        """
        Args:
            traced: a dense network.

        Raises:
            UserError: for an operation that has no meaning on sites.
        """
        super().__init__()
        network = traced.network
        self.network = getattr(network, "encoder_name", type(network).__name__)
        self.strides, self.channels, self.taps = traced.strides, traced.channels, traced.taps
        self.total_stride = self.strides[-1]
        # as in the paper (section 3.3) and its code
        self.densify_norm = partial(sparse.LayerNorm, eps=1e-6) if normalises_by_layer(network) else sparse.BatchNorm2d
        translation = _Translation(traced)
        for path, layer in translation.layers.items():
            _place(self, network, path, layer)
        self.outputs = tuple(translation.numbers[node] for node in traced.scales)
        self.segments = _segments(_fused(translation.steps, self), set(self.outputs))
        self.train(network.training)
        _channels_last(self)

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """Features of every scale, shallow to deep, of a sparse image at stride 1."""
        values: dict[int, Any] = {INPUT: x}
        for segment in self.segments:
            if self.checkpointing and self.training:
                values |= self._checkpointed(segment, values)
            else:
                self._run(segment.steps, values)
            values = {number: value for number, value in values.items() if number in segment.kept}
        return [values[number] for number in self.outputs]

    def _run(self, steps: Sequence[Step], values: dict[int, Any]) -> None:
        """Compute steps, adding their results to `values` and dropping what nothing needs any more."""
        for step in steps:
            args, kwargs = self._filled((step.args, step.kwargs), values)
            if step.layer is None:
                assert step.function is not None
                values[step.result] = step.function(*args, **kwargs)
            else:
                layer: Any = attrgetter(step.layer)(self)
                values[step.result] = step.function(layer, *args, **kwargs) if step.function else layer(*args, **kwargs)
            for number in step.last_uses:
                del values[number]

    def _checkpointed(self, segment: "Segment", values: dict[int, Any]) -> dict[int, Any]:
        """What a segment hands on; it keeps only what it starts from for the backward pass."""
        inputs = {number: values[number] for number in segment.inputs}
        templates: dict[int, Any] = {}

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            inner = _unpacked(inputs, tensors)
            self._run(segment.steps, inner)
            templates.update({number: inner[number] for number in segment.results})
            return _packed(templates)

        layers = [attrgetter(step.layer)(self) for step in segment.steps if step.layer]
        norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
        rows = checkpoint(
            run, *_packed(inputs), use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(norms))
        )
        return _unpacked(templates, rows)

    def _filled(self, arguments: Any, values: dict[int, Any]) -> Any:
        """Arguments with results and attributes in the place of what stands for them."""

        def fill(argument: Any) -> Any:
            if isinstance(argument, Result):
                return values[argument.step]
            return attrgetter(argument.path)(self) if isinstance(argument, Attribute) else argument

        return map_aggregate(arguments, fill)


def _packed(values: dict[int, Any]) -> tuple[Tensor, ...]:
    """The tensors among values; of sparse ones their features."""
    tensors = (value.F if functions.is_sparse(value) else value for value in values.values())
    return tuple(tensor for tensor in tensors if isinstance(tensor, Tensor))


def _unpacked(templates: dict[int, Any], tensors: Sequence[Tensor]) -> dict[int, Any]:
    """Values like these, of other tensors."""
    rest = iter(tensors)
    return {
        number: sparse.with_features(value, next(rest))
        if functions.is_sparse(value)
        else next(rest)
        if isinstance(value, Tensor)
        else value
        for number, value in templates.items()
    }


def sparsify(network: nn.Module, in_channels: int = 3, scales: int = 4) -> SparseEncoder:
    """Make a sparse encoder of a dense convnet.

    Args:
        network: of torchvision, timm or one's own; it shares its parameters with the encoder.
        in_channels: of the images.
        scales: of feature maps, at most: those at the deepest strides.

    Raises:
        UserError: if it cannot be traced, has no maps at strides that are powers of two, or an operation in it has no
            meaning on visible sites alone: which, where it is written, and what to do.
    """
    modules.library_rules()
    return SparseEncoder(trace(network, in_channels, scales))


class _Translation:
    """The steps of a trace, and the layers that they need by path."""

    def __init__(self, traced: Trace) -> None:
        self.traced = traced
        self.steps: list[Step] = []
        self.layers: dict[str, Any] = {}
        self.numbers = {node: number for number, node in enumerate(traced.nodes)}
        self.padding: dict[fx.Node, modules.Padding] = {}
        self.values = dict(traced.values)
        for node in traced.nodes:
            try:
                self._translate(node)
            except (ValueError, TypeError) as error:  # the latter of arguments that depend on the image
                raise modules.refusal(place_of(node), str(error), type(traced.network).__name__) from error
        used = {self.numbers[node] for node in traced.scales}
        for step in reversed(self.steps):
            if step.result in used:
                used.update(step.operands())
        self.steps = [step for step in self.steps if step.result in used]

    def _translate(self, node: fx.Node) -> None:
        """Add what computes a node."""
        maps = [other for other in node.all_input_nodes if self._is_map(other)]
        number, target = self.numbers[node], str(node.target)
        args: Any
        kwargs: Any
        args, kwargs = map_arg((node.args, dict(node.kwargs)), self._reference)
        if node.op == "get_attr":
            self.layers.setdefault(target, attrgetter(target)(self.traced.network))
        elif node.op == "call_module":
            layer: Any = self.traced.network.get_submodule(target)
            function = None
            if maps and isinstance(layer, nn.ConstantPad2d):
                self._pad(node, (layer.padding, "constant", layer.value), {})
                return
            if maps and _does_nothing(layer):  # whoever reads it reads its input
                self.layers.setdefault(target, layer)
                self._stand_for(node, maps[0])
                return
            if maps:  # a dense module on values of images is its own
                module = layer
                layer, function = modules.layer_of(module, self._value(maps[0]), self.padding.get(maps[0]))
            self.layers.setdefault(target, layer)
            self.steps.append(Step(number, target, function, args, kwargs))
            if maps:
                self._drop_after(module, target)
        elif maps and getattr(node.target, "__name__", "") == "pad":
            self._pad(node, node.args[1:], node.kwargs)
        elif maps and not self._is_indexing(node):
            self.steps.append(self._function(node, number))
        elif node.op != "placeholder":
            if not maps and self._is_map(node):
                raise ValueError("makes a map of what is none")
            self.steps.append(Step(number, None, self._own_function(node), args, kwargs))

    def _reference(self, node: fx.Node) -> Any:
        """What stands for a node's result among arguments."""
        return Attribute(str(node.target)) if node.op == "get_attr" else Result(self.numbers[node])

    def _own_function(self, node: fx.Node) -> Any:
        """What the author called: on values of images, on parameters and on numbers it is as it was."""
        if node.op == "call_function":
            return node.target
        first: Any = node.args[0]
        value = self.values.get(first)
        return getattr(torch.Tensor if isinstance(value, Value) else type(value), str(node.target))

    def _pad(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Zeros around a map: whoever reads it, a convolution or pooling, has them as padding."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source in self.padding:
            raise ValueError("pads what is padded with zeros")
        around = modules.padding_of(self._value(source), args, kwargs)
        self._stand_for(node, source)
        self.padding[node] = around

    def _stand_for(self, node: fx.Node, source: fx.Node) -> None:
        """Let a node's result be that of another."""
        self.numbers[node], self.values[node] = self.numbers[source], self.values[source]
        if source in self.padding:
            self.padding[node] = self.padding[source]

    def _drop_after(self, module: nn.Module, path: str) -> None:
        """Add the stochastic depth that `spark_me.drop_path` set behind a norm."""
        step = self.steps[-1]
        rate = getattr(module, "drop_prob", 0.0) if isinstance(module, _BatchNorm) else 0.0
        if rate:
            self.layers[path].__dict__.pop("drop_prob", None)
            number, path = step.result, f"{path}_drop_path"
            self.layers[path] = sparse.DropPath(rate)
            hidden = -number  # the norm's own result, which nothing else takes
            self.steps[-1:] = [replace(step, result=hidden), Step(number, path, None, (Result(hidden),))]

    def _function(self, node: fx.Node, number: int) -> Step:
        name = str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))
        if name == "dropout":  # its `training` was traced as it stood then: a module knows how it stands now
            return self._dropout(node, number)
        function: Any = getattr(torch.Tensor, name, None) if node.op == "call_method" else node.target
        nodes: list[fx.Node] = []

        def described(other: fx.Node) -> Any:
            value = self.values.get(other)
            if isinstance(value, Value):
                nodes.append(other)
            elif isinstance(value, tuple) and any(isinstance(each, Value) for each in value):
                raise ValueError("takes the parts of a map at once: name each of them")
            if other in self.padding:
                raise ValueError("reads a map that is padded with zeros, which only modules may")
            return value

        args, kwargs = map_arg((node.args, dict(node.kwargs)), described)
        operands = [self._value(other) for other in nodes]
        call = functions.Call(name, function, args, kwargs, operands, self.values.get(node))
        return Step(number, None, functions.function_of(call), tuple(map(self._reference, nodes)))

    def _dropout(self, node: fx.Node, number: int) -> Step:
        source, rate = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        assert isinstance(source, fx.Node) and isinstance(rate, float | int)
        path = f"{path_of(node)}.{node.name}".lstrip(".")
        self.layers[path] = nn.Dropout(rate)
        return Step(number, path, modules.rowwise, (Result(self.numbers[source]),))

    def _value(self, node: fx.Node) -> Value:
        value = self.values.get(node)
        if not isinstance(value, Value):
            raise ValueError(f"takes what is no tensor ({value})")
        return value

    def _is_map(self, node: fx.Node) -> bool:
        value = self.values.get(node)
        values = value if isinstance(value, tuple) and not isinstance(value, Value) else (value,)
        return any(isinstance(each, Value) and (each.is_map or "?" in each.axes) for each in values)

    def _is_indexing(self, node: fx.Node) -> bool:
        """Whether a node picks one of several tensors."""
        first = node.args[0] if node.target is getitem else None
        held = self.values.get(first) if isinstance(first, fx.Node) else None
        return isinstance(held, tuple) and not isinstance(held, Value)


def _does_nothing(module: nn.Module) -> bool:
    """Whether a module returns what it is given: also one for dropout in a network that has none."""
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)


def _place(encoder: nn.Module, network: nn.Module, path: str, layer: Any) -> None:
    """Put a layer, parameter or buffer where the network has it."""
    *parents, name = path.split(".")
    place, theirs = encoder, network
    for parent in parents:
        theirs = getattr(theirs, parent)
        if not hasattr(place, parent):
            place.add_module(parent, Container(type(theirs).__name__))
        place = getattr(place, parent)
    if isinstance(layer, nn.Module):
        place.add_module(name, layer)
    elif isinstance(layer, nn.Parameter):
        place.register_parameter(name, layer)
    elif isinstance(layer, Tensor):
        place.register_buffer(name, layer, persistent=name not in theirs._non_persistent_buffers_set)
    else:
        setattr(place, name, layer)


def _channels_last(encoder: nn.Module) -> None:
    """Lay convolution weights in memory as the native backend reads them; values and shapes stay."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _fused(steps: list[Step], encoder: SparseEncoder) -> list[Step]:
    """Join a batch norm with stochastic depth, residual sum and ReLU behind it, and GELU with a response norm."""
    users: dict[int, list[Step]] = {}
    for step in steps:
        for number in step.operands():
            users.setdefault(number, []).append(step)
    by_number = {step.result: step for step in steps}
    replaced: dict[int, Step | None] = {}  # None: it is part of another

    def only_user(step: Step) -> Step | None:
        own = users.get(step.result, [])
        return own[0] if len(own) == 1 and step.result not in encoder.outputs else None

    def layer(step: Step | None) -> Any:
        return None if step is None or step.layer is None else attrgetter(step.layer)(encoder)

    for step in steps:
        if type(layer(step)) is sparse.BatchNorm2d:
            chain: list[Step] = [step]
            options: dict[str, Any] = {}
            follower = only_user(step)
            if isinstance(layer(follower), sparse.DropPath):
                assert follower is not None
                options["drop_path"] = Attribute(str(follower.layer))
                chain.append(follower)
                follower = only_user(follower)
            if follower is not None and follower.function is sparse.add and follower.result not in replaced:
                other = [arg for arg in follower.args if arg != Result(chain[-1].result)]
                if len(other) == 1:
                    options["shortcut"] = other[0]
                    chain.append(follower)
                    follower = only_user(follower)
            elif "drop_path" in options:
                continue
            if follower is not None and _is_relu(follower, layer(follower)):
                options["relu"] = True
                chain.append(follower)
            if len(chain) > 1:
                replaced.update(dict.fromkeys([each.result for each in chain]))
                replaced[chain[-1].result] = replace(step, result=chain[-1].result, kwargs=options)
        elif isinstance(layer(step), sparse.GlobalResponseNorm):
            before = by_number.get(step.args[0].step)
            if before is not None and _is_gelu(before, layer(before)) and only_user(before) is step:
                replaced[before.result] = None
                replaced[step.result] = replace(step, args=before.args, kwargs={"gelu": True})
    return [new for step in steps if (new := replaced.get(step.result, step))]


def _is_gelu(step: Step, layer: Any) -> bool:
    if isinstance(step.function, functions.Pointwise):
        call = step.function.call
        return call.name == "gelu" and call.argument(1, "approximate", "none") == "none"
    return type(layer) is nn.GELU and layer.approximate == "none"


def _is_relu(step: Step, layer: Any) -> bool:
    return type(layer) is nn.ReLU or (
        isinstance(step.function, functions.Pointwise) and step.function.call.name == "relu"
    )


def _segments(steps: Sequence[Step], outputs: set[int]) -> list[Segment]:
    """Steps cut where, beside the encoder's outputs, one result crosses; each cut is a block long at least."""
    needed = set(outputs)
    released: list[Step] = []
    after: list[set[int]] = []  # what is needed after a step
    for step in reversed(steps):
        after.append(set(needed))
        unused = ({step.result} | step.operands()) - needed
        released.append(replace(step, last_uses=tuple(sorted(unused))))
        needed = (needed | step.operands()) - {step.result}
    segments: list[Segment] = []
    part: list[Step] = []
    for step, kept in zip(released[::-1], after[::-1]):
        part.append(step)
        if step is released[0] or (len(part) >= STEPS_OF_SEGMENT and len(kept - outputs) <= 1):
            made = {each.result for each in part}
            inputs = {number for each in part for number in each.operands()} - made
            segments.append(Segment(part, tuple(sorted(inputs)), tuple(sorted(made & kept)), frozenset(kept)))
            part = []
    return segments


@contextmanager
def _frozen_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """The second forward pass must not move running statistics again."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, batches
