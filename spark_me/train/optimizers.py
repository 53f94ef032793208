"""LAMB and AdamW, each operation on all parameters of a group; a CUDA graph can hold their step if `capturable`."""

from collections.abc import Callable, Sequence
from typing import Any

import timm.optim
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

Number = float | Tensor
"""The host's, or 0-dimensional on the parameters' device."""


class Lamb(timm.optim.Lamb):
    """timm's LAMB (same state, groups and numbers), without its options beyond these, and the host waits for nothing.

    `capturable` counts steps on the device: nothing that changes from step to step is the host's, if `lr` and
    `weight_decay` are tensors where they change. As with torch's optimizers, a first step comes before capture.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        always_adapt: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            bias_correction=bias_correction,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            always_adapt=always_adapt,
        )
        self.defaults["capturable"] = capturable  # not of groups: theirs stay timm's

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; return what the closure did."""
        loss = _evaluate(closure)
        clipping = self._clipping()
        for group in self.param_groups:
            count = self._count_step(group)
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in _with_gradient(group):
                alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group, count, clipping)
        return loss

    def _clipping(self) -> Tensor | None:
        """What gradients are divided by, so that the norm of all of them keeps its limit."""
        largest = self.defaults["max_grad_norm"]
        parameters = [parameter for group in self.param_groups for parameter in _with_gradient(group)]
        if largest is None or not parameters:
            return None
        norms = torch._foreach_norm(_gradients(parameters))
        return (torch.stack(norms).norm() / largest).clamp(min=1.0)

    def _count_step(self, group: dict[str, Any]) -> Number:
        """Steps with this one: the host's number, or a float64 [] on the device, as its powers need."""
        capturable = self.defaults["capturable"]
        device = group["params"][0].device if capturable else torch.device("cpu")
        # A checkpoint's comes from the CPU; an older timm's is an int.
        group["step"] = torch.as_tensor(group.get("step", 0.0), dtype=torch.float32, device=device)
        group["step"].add_(1)
        return group["step"].double() if capturable else group["step"].item()

    def _update(self, parameters: list[Tensor], group: dict[str, Any], count: Number, clipping: Tensor | None) -> None:
        """Change parameters of one device and dtype. At most two copies of them are alive at once."""
        dtype = parameters[0].dtype
        averages, squares = self._averages(parameters)
        gradients = _gradients(parameters)
        if clipping is not None:
            gradients = list(torch._foreach_div(gradients, _of_type(clipping, dtype)))  # copies: `.grad` stays
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        del gradients
        denominators = torch._foreach_sqrt(squares)
        if group["bias_correction"]:
            torch._foreach_div_(denominators, _of_type((1 - beta2**count) ** 0.5, dtype))
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(averages, denominators)
        del denominators
        if group["bias_correction"]:
            torch._foreach_div_(updates, _of_type(1 - beta1**count, dtype))

        decay, rate = _of_type(group["weight_decay"], dtype), _of_type(group["lr"], dtype)
        if isinstance(decay, Tensor):
            torch._foreach_add_(updates, torch._foreach_mul(parameters, decay))
        elif decay:
            torch._foreach_add_(updates, parameters, alpha=decay)
        elif not group["always_adapt"]:
            torch._foreach_mul_(updates, -rate)
            torch._foreach_add_(parameters, updates)
            return
        weights, steps = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, updates))
        fixed = (weights == 0) | (steps == 0)
        if isinstance(decay, Tensor) and not group["always_adapt"]:
            fixed |= decay == 0
        rates = (weights / steps).masked_fill_(fixed, 1.0) * -rate
        torch._foreach_addcmul_(parameters, updates, rates.unbind())

    def _averages(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of the gradients and of their squares."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        states = [self.state[parameter] for parameter in parameters]
        return [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]


class AdamW(torch.optim.AdamW):
    """torch's, but `weight_decay` may be a tensor as `lr` may be: torch would read it back."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; return what the closure did."""
        loss = _evaluate(closure)
        decays = [group["weight_decay"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                if isinstance(group["weight_decay"], Tensor):
                    self._decay(group)
                    group["weight_decay"] = 0.0
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays):
                group["weight_decay"] = decay
        return loss

    @torch.no_grad()
    def _decay(self, group: dict[str, Any]) -> None:
        parameters, share = _with_gradient(group), group["lr"] * group["weight_decay"]
        overflow = getattr(self, "found_inf", None)  # fp16's scaler sets it: 1 where a fused step leaves itself out
        if overflow is not None:
            share = share * (1 - overflow)
        if parameters:
            torch._foreach_mul_(parameters, _of_type(1 - share, parameters[0].dtype))


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _of_type(number: Number, dtype: torch.dtype) -> Any:
    """Kernels of many tensors take a tensor of their own type."""
    return number.to(dtype) if isinstance(number, Tensor) else number
