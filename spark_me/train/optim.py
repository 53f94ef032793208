"""The optimizer and its parameter groups."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from timm.optim import Lamb
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from spark_me.config_schema import OptimConfig

UNDECAYED = ("bias", "beta", "gamma", "layer_scale", "mask_token")
"""Names of parameters without weight decay, whatever their shape."""


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


def parameter_groups(model: nn.Module, lr_scale: Callable[[str], float] = full_rate) -> list[dict[str, Any]]:
    """Parameters with weight decay, then those without: norms, biases, layer scales, other vectors and mask tokens.

    Args:
        model: whose parameters they are.
        lr_scale: parameter's name → its share of the learning rate. Each share has groups of its own.
    """
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        # MinkowskiEngine keeps a bias as [1, C], so a vector is not known by its rank alone.
        decayed = parameter.dim() > 1 and name.rpartition(".")[2] not in UNDECAYED
        groups.setdefault((decayed, lr_scale(name)), []).append(parameter)
    return [
        {"params": parameters, "decayed": decayed, "lr_scale": scale}
        for (decayed, scale), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]
