"""Dense networks for use downstream: a library's own network, which also gives its feature maps."""

from typing import Any

from torch import Tensor, fx, nn

from spark_me.networks import dense_network, makes_classifier
from spark_me.trace import Trace, graph_of_maps, trace

_FEATURED: dict[type, type] = {}


class Features:
    """What a network of `build_network` has beside its own class.

    Attributes:
        num_classes: of its classifier; None for none.
        in_channels: of its images.
    """

    num_classes: Any  # int or None for ours; libraries declare it each in their way
    in_channels: int
    _pooled: bool
    """Whether `forward` averages the deepest map by itself, instead of the library's own head."""

    def feature_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W], normalised as in training → maps [B, C_i, H/s_i, W/s_i], shallow to deep."""
        module: Any = self
        maps: tuple[Tensor, ...]
        if "_graph" not in self.__dict__:
            self.__dict__["_graph"] = graph_of_maps(self.traced)
        maps = fx.Interpreter(module, graph=self.__dict__["_graph"]).run(images, enable_io_processing=False)
        return maps

    def extract_feat(self, images: Tensor) -> tuple[Tensor, ...]:
        """What mmpretrain's models return by this name: the maps of `feature_maps`; of a classifier, its input alone.

        Args:
            images: [B, C, H, W], normalised as in training.

        Returns:
            Maps [B, C_i, H/s_i, W/s_i]; one tensor [B, C] in a tuple where there is a classifier.
        """
        if not self.num_classes:
            return self.feature_maps(images)
        module: Any = self
        found: list[Tensor] = []
        handle = classifier_of(module).register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0]))
        try:
            module(images)
        finally:
            handle.remove()
        return (found[0].flatten(1),)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]; without a classifier the deepest features, averaged: [B, C]."""
        if not self._pooled:
            return self.library_forward(images)
        pooled = self.feature_maps(images)[-1].mean((2, 3))
        return pooled if self.num_classes is None else classifier_of(self)(pooled)

    def library_forward(self, images: Tensor) -> Tensor:
        """The library's own; of a network without a classifier, that does nothing behind the deepest map but pool."""
        out: Tensor = super().forward(images)  # type: ignore[misc]
        return out

    @property
    def traced(self) -> Trace:
        """The network's graph up to its deepest map; traced when first asked for."""
        if "_traced" not in self.__dict__:
            module: Any = self
            self.__dict__["_traced"] = trace(module, self.in_channels)
        traced: Trace = self.__dict__["_traced"]
        return traced

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_traced", "_graph")}

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (_base_of(type(self)),), self.__getstate__()


def build_network(name: str, num_classes: int | None = None, in_channels: int = 3, drop_path: float = 0.0) -> nn.Module:
    """A dense network with random weights.

    Args:
        name: of an encoder: torchvision's, `timm/NAME`, or a registered one.
        num_classes: of its classifier; None: the network ends with its deepest map, and has nothing that this does not
            need.
        in_channels: channels of the images.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.

    Returns:
        The library's own network, with the methods of `Features`.

    Raises:
        UserError: for an unknown name, a library that is missing, or stochastic depth that the network does not
            have.
    """
    network: Any = dense_network(name, in_channels, num_classes, drop_path)
    pooled = num_classes is None or not makes_classifier(name)
    if pooled:
        traced = trace(network, in_channels)
        strip(network, {*traced.state_names})
        if num_classes is not None:
            network.add_module("fc", nn.Linear(traced.channels[-1], num_classes))
    network.__class__ = _featured(type(network))
    network.num_classes, network.in_channels, network._pooled = num_classes, in_channels, pooled
    return network


def classifier_of(network: Any) -> nn.Module:
    """The layer that gives a network's logits: the last linear one."""
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    return last


def _featured(kind: type) -> Any:
    """A library's class with `Features`; the same one for the same class."""
    if kind not in _FEATURED:
        _FEATURED[kind] = type(
            kind.__name__, (Features, kind), {"__doc__": kind.__doc__, "__module__": kind.__module__}
        )
    return _FEATURED[kind]


def _base_of(kind: type) -> type[nn.Module]:
    """The library's own class."""
    return kind.__mro__[kind.__mro__.index(Features) + 1]


def _empty(kind: type[nn.Module]) -> nn.Module:
    featured = _featured(kind)
    network: nn.Module = featured.__new__(featured)
    return network


def strip(network: nn.Module, needed: set[str]) -> None:
    """Put a module that does nothing in the place of each whose state no map depends on."""
    for path, module in list(network.named_modules()):
        own = {f"{path}.{name}" for name in (*module._parameters, *module._buffers)}
        if path and own and not own & needed:
            parent, _, leaf = path.rpartition(".")
            setattr(network.get_submodule(parent), leaf, nn.Identity())
