"""The optimizer and its parameter groups."""

from typing import Any

from timm.optim import Lamb
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from spark_me.config_schema import OptimConfig

UNDECAYED = ("bias", "beta", "gamma", "mask_token")
"""Names of parameters without weight decay, whatever their shape."""


def build_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """LAMB or AdamW over two groups; learning rate and weight decay are set by `Schedule.apply` before each step."""
    groups = parameter_groups(model)
    betas = (optim.betas[0], optim.betas[1])
    if optim.name == "lamb":
        # Clipping is the training step's, for both optimizers alike.
        return Lamb(groups, lr=0.0, betas=betas, max_grad_norm=None)
    return AdamW(groups, lr=0.0, betas=betas)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters with weight decay and those without: norms, biases, layer scales, other vectors and mask tokens."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        # MinkowskiEngine keeps a bias as [1, C], so a vector is not known by its rank alone.
        is_free = parameter.dim() <= 1 or name.rpartition(".")[2] in UNDECAYED
        (free if is_free else decayed).append(parameter)
    return [{"params": decayed, "decayed": True}, {"params": free, "decayed": False}]
