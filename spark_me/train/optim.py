"""The optimizer and its parameter groups."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from timm.optim import Lamb
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW, Optimizer

from spark_me.config_schema import OptimConfig


def full_rate(name: str) -> float:
    """The `lr_scale` of tasks in which all parameters learn alike."""
    return 1.0


def build_optimizer(model: nn.Module, optim: OptimConfig, lr_scale: Callable[[str], float] = full_rate) -> Optimizer:
    """LAMB or AdamW over groups; learning rate and weight decay are set by `Schedule.apply` before each step."""
    groups = parameter_groups(model, lr_scale)
    betas = (optim.betas[0], optim.betas[1])
    if optim.name == "lamb":
        return Lamb(groups, lr=0.0, betas=betas, **asdict(optim.lamb))
    return AdamW(groups, lr=0.0, betas=betas)


def _decays(module: nn.Module, name: str) -> bool:
    """Whether a parameter is a weight: layer scales and mask tokens have several axes, too, but one of more than 1."""
    if isinstance(module, _ConvNd | nn.Linear):
        return name == "weight"
    return sum(size > 1 for size in getattr(module, name).shape) > 1


def parameter_groups(model: nn.Module, lr_scale: Callable[[str], float] = full_rate) -> list[dict[str, Any]]:
    """Parameters with weight decay, then those without: norms, biases, layer scales, other vectors and mask tokens.

    Args:
        model: whose parameters they are.
        lr_scale: parameter's name → its share of the learning rate. Each share has groups of its own.
    """
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    decays = {
        id(parameter): _decays(module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        groups.setdefault((decays[id(parameter)], lr_scale(name)), []).append(parameter)
    return [
        {"params": parameters, "decayed": decayed, "lr_scale": scale}
        for (decayed, scale), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]
