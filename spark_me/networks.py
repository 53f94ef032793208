"""Dense convnets by name: torchvision's, timm's and one's own. Importing this imports neither of these libraries."""

import difflib
import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from spark_me.errors import UserError, install_text

if TYPE_CHECKING:
    from torch import nn

TIMM = "timm/"
"""What the names of timm's networks begin with."""
TOTAL_STRIDE = 32
"""Of every network in `ENCODERS`."""

# Stochastic depth of the last block in the published recipes: ResNet-50 to -200, ConvNeXt Small to Large, ConvNeXt V2
# Tiny. Where none was published, smaller networks get less of it than their published relatives, the smallest none;
# networks of the sizes of ConvNeXt Base and Large get what those have, and Huge no more than that.
ENCODERS: dict[str, float] = {
    "resnet18": 0.0,
    "resnet34": 0.0,
    "resnet50": 0.05,
    "resnet101": 0.08,
    "resnet152": 0.10,
    "resnet200": 0.15,
    "convnext_tiny": 0.1,
    "convnext_small": 0.2,
    "convnext_base": 0.3,
    "convnext_large": 0.4,
    "convnextv2_atto": 0.0,
    "convnextv2_femto": 0.0,
    "convnextv2_pico": 0.0,
    "convnextv2_nano": 0.0,
    "convnextv2_tiny": 0.2,
    "convnextv2_base": 0.3,
    "convnextv2_large": 0.4,
    "convnextv2_huge": 0.4,
}
"""Networks of the published recipes and their relatives, each with its default stochastic depth."""
OF_TIMM = ("resnet200", *(name for name in ENCODERS if name.startswith("convnextv2_")))
"""Those of them that torchvision lacks."""

_OWN: dict[str, Callable[..., "nn.Module"]] = {}


def list_encoders() -> list[str]:
    """Names of the published recipes' networks and of registered ones; torchvision's and timm's are known beside them.

    `spark-me encoders` lists those too.
    """
    return [*ENCODERS, *_OWN]


def register_encoder(name: str, factory: Callable[..., "nn.Module"]) -> None:
    """Make a network of one's own known by name: to `build_model`, to configurations and to every command.

    Args:
        name: a new name.
        factory: from `in_channels`, and `num_classes` and `drop_path` if it takes keywords of these names, to a dense
            network. `num_classes` is None where no classifier is needed.

    Raises:
        UserError: for a name that is taken.
    """
    if name in ENCODERS or name in _OWN or name.startswith(TIMM) or name in _names_of_torchvision():
        raise UserError(f"encoder {name!r} exists already: register yours under another name")
    _OWN[name] = factory


def require_known(name: str) -> None:
    """Refuse a name that is none of a network.

    Raises:
        UserError: with the nearest name, or for timm's where timm is missing.
    """
    if name in ENCODERS or name in _OWN:
        return
    known = _names_of_torchvision()
    if name.startswith(TIMM):
        known = _names_of_timm()
        if not known:
            raise UserError(f"encoder {name!r} needs timm: {install_text('train')}")
    if name not in known:
        close = difflib.get_close_matches(name, [*list_encoders(), *known], n=1)
        hint = f"did you mean {close[0]}?" if close else "`spark-me encoders` lists what there is"
        raise UserError(f"unknown encoder {name!r}: {hint}")


def dense_network(
    name: str, in_channels: int = 3, num_classes: int | None = None, drop_path: float | None = 0.0
) -> "nn.Module":
    """A dense network with random weights, as its library makes it.

    Args:
        name: of torchvision, `timm/NAME`, or registered.
        in_channels: channels of the images.
        num_classes: of its classifier; None: whatever classifier it has by default, or none.
        drop_path: stochastic depth of the last block; it grows from 0 at the first. None: that of the published
            recipes, for other networks what their library gives them.

    Raises:
        UserError: for an unknown name, a missing library, or stochastic depth that the network does not have.
    """
    require_known(name)
    rate = ENCODERS.get(name) if drop_path is None else drop_path
    network: Any
    if name in _OWN:
        network = _of_factory(_OWN[name], in_channels, num_classes, rate)
    elif name.startswith(TIMM) or name in OF_TIMM:
        network = _of_timm(name, in_channels, num_classes, rate)
    else:
        network = _with_drop_path(_of_torchvision(name, in_channels, num_classes), rate)
    network.encoder_name = name  # by which weights know it
    return network


def _with_drop_path(network: "nn.Module", rate: float | None) -> "nn.Module":
    from spark_me.drop_path import set_drop_path

    if rate is not None:
        set_drop_path(network, rate)
    return network


def makes_classifier(name: str) -> bool:
    """Whether a network of this name has a classifier of so many classes as it is asked for."""
    return name not in _OWN or "num_classes" in inspect.signature(_OWN[name]).parameters


def patch_size_of(name: str) -> int:
    """P, the total stride of a network.

    Raises:
        UserError: for an unknown name, or a network that cannot become sparse.
    """
    return TOTAL_STRIDE if name in ENCODERS else _traced_stride(name, _OWN.get(name))


@cache
def _traced_stride(name: str, factory: Callable[..., "nn.Module"] | None) -> int:
    from spark_me.trace import trace

    return trace(empty_network(name)).strides[-1]


def empty_network(name: str, in_channels: int = 3, num_classes: int | None = None) -> "nn.Module":
    """A network without values, for its names and shapes: on the meta device.

    Raises:
        UserError: as `dense_network`.
    """
    import torch

    try:
        with torch.device("meta"):
            return dense_network(name, in_channels, num_classes)
    except NotImplementedError:  # it computes its widths by tensors
        return dense_network(name, in_channels, num_classes).to("meta")


def _of_factory(
    factory: Callable[..., "nn.Module"], in_channels: int, num_classes: int | None, rate: float | None
) -> "nn.Module":
    taken = inspect.signature(factory).parameters
    options = {"num_classes": num_classes} | ({} if rate is None else {"drop_path": rate})
    network = factory(in_channels, **{key: value for key, value in options.items() if key in taken})
    return network if "drop_path" in taken else _with_drop_path(network, rate)


def _of_timm(name: str, in_channels: int, num_classes: int | None, rate: float | None) -> "nn.Module":
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{name} needs timm: {install_text('train')}") from error
    options: dict[str, Any] = {"in_chans": in_channels} | ({} if num_classes is None else {"num_classes": num_classes})
    plain = name.removeprefix(TIMM)
    if not rate:  # timm's networks drop nothing unless they are told to
        return timm.create_model(plain, **options)
    try:
        return timm.create_model(plain, drop_path_rate=rate, **options)
    except TypeError:  # of a network without stochastic depth
        return _with_drop_path(timm.create_model(plain, **options), rate)


def _of_torchvision(name: str, in_channels: int, num_classes: int | None) -> "nn.Module":
    try:
        from torchvision import models
    except ImportError as error:
        raise UserError(f"{name} needs torchvision: {install_text('inference')}") from error
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    taken = inspect.signature(inspect.unwrap(models.get_model_builder(name))).parameters
    if "kwargs" in taken and name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}  # heads of their own training
    network = models.get_model(name, weights=None, **options)
    if in_channels != 3:
        _replace_first_convolution(network, in_channels)
    return network


def _replace_first_convolution(network: "nn.Module", in_channels: int) -> None:
    """For other images than RGB: the same convolution, its weights drawn with the same deviation."""
    import torch
    from torch import nn

    path, old = next((path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d))
    options: dict[str, Any] = {
        key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    new = nn.Conv2d(in_channels, old.out_channels, bias=old.bias is not None, **options)
    with torch.no_grad():
        new.weight.normal_(std=1.0 if old.weight.is_meta else old.weight.std().item())
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, new)


def all_names() -> list[str]:
    """Every name that there is: ours, torchvision's and timm's."""
    return list(dict.fromkeys([*list_encoders(), *_names_of_torchvision(), *_names_of_timm()]))


@cache
def _names_of_torchvision() -> tuple[str, ...]:
    try:
        from torchvision import models
    except ImportError:
        return ()
    return tuple(models.list_models(module=models))


@cache
def _names_of_timm() -> tuple[str, ...]:
    try:
        import timm
    except ImportError:
        return ()
    return tuple(TIMM + name for name in timm.list_models())
