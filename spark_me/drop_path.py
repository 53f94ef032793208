"""Stochastic depth (arXiv 1603.09382) of dense networks: a residual branch is left out for some images."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spark_me.errors import UserError
from spark_me.trace import library_types


def set_drop_path(network: nn.Module, rate: float) -> None:
    """Drop branches in training, with a probability that grows linearly from 0 at the first block to `rate`.

    torchvision's ResNets know no stochastic depth: it is set behind the last norm of their branches, which must not be
    replaced afterwards.

    Raises:
        UserError: for a network that has neither.
    """
    own = [module for module in network.modules() if type(module).__name__ in ("StochasticDepth", "DropPath")]
    ends = [*residual_ends(network)]
    blocks: list[Any] = own or ends
    if not blocks and rate:
        raise UserError(
            f"drop_path={rate:g}: {type(network).__name__} has no stochastic depth: leave it at 0, or build the "
            "network with it"
        )
    for block, probability in zip(blocks, torch.linspace(0, rate, len(blocks), device="cpu").tolist()):
        if not own:
            drop_after(block, probability)
        elif hasattr(block, "drop_prob"):  # timm's
            block.drop_prob = probability
        else:
            block.p = probability


def drop_after(norm: Any, probability: float) -> None:
    """Drop what a norm returns; its `drop_prob` says so to whoever does not call it."""
    if not hasattr(norm, "drop_prob"):
        norm.register_forward_hook(_drop)
    norm.drop_prob = probability


def _drop(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if not module.training or not module.drop_prob:
        return output
    kept = torch.rand(len(output), device=output.device) >= module.drop_prob
    return output * (kept.to(output.dtype) / (1 - module.drop_prob)).view(-1, *[1] * (output.dim() - 1))


def start_residuals(network: nn.Module, weight: float) -> bool:
    """Start the norms that end ResNets' residual branches at this weight: 0 as timm does, 1 as torchvision.

    Returns:
        Whether the network has such norms.
    """
    norms = [*residual_ends(network)]
    for norm in norms:
        nn.init.constant_(norm.weight, weight)
    return bool(norms)


def residual_ends(network: nn.Module) -> Iterator[Any]:
    """The last norms of residual branches: of torchvision's and timm's ResNets."""
    kinds = tuple(kind for _, kind in library_types(RESNET_BLOCKS))
    for module in network.modules():
        if isinstance(module, kinds):
            norm = getattr(module, "bn3", None) or module.bn2
            if isinstance(norm, _BatchNorm) and norm.weight is not None:
                yield norm


RESNET_BLOCKS = dict.fromkeys(("torchvision.models.resnet", "timm.models.resnet"), ("BasicBlock", "Bottleneck"))
