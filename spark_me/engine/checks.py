"""Proof of the installed engine: its layers against dense torch on masked maps, forward and backward.

Each layer runs with every variant (backend and dtype) on every case, twice; the reference is computed in float64. On a
GPU, cases of few sites are compared with the engine on the CPU as well.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spark_me import sparse
from spark_me.devices import float32_products
from spark_me.engine.check_cases import Case
from spark_me.engine.check_layers import Layer, Masks, layers

_FEW_SITES = 20_000
Outcome = dict[str, Tensor]
"""What a layer computed: "output", buffers, and gradients of the maps and of parameters, by name."""


@dataclass(frozen=True)
class Variant:
    """How a layer computes."""

    backend: str
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """The largest error that counts as agreement."""
        return 1e-9 if self.dtype == torch.float64 else 1e-4


@dataclass(frozen=True)
class Result:
    """How far a layer is from its references.

    Attributes:
        layer, device, variant: what ran.
        error: relative to the largest value, the worst of all that was compared.
        case: where it was worst.
        repeatable: whether two runs gave the same bits.
        problem: why it could not run, "" if it did.
    """

    layer: str
    device: str
    variant: Variant
    error: float = 0.0
    case: str = ""
    repeatable: bool = True
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether they agree; a NaN does not."""
        return not self.problem and self.error <= self.variant.tolerance

    @property
    def name(self) -> str:
        """The layer and how it ran, for people."""
        return f"{self.layer} ({self.device}, {self.variant.backend}, {str(self.variant.dtype).split('.')[-1]})"


def variants_for(device: str) -> tuple[Variant, ...]:
    """On the CPU the engine's own kernels in float64; on a GPU both backends in both dtypes that the engine has."""
    if device == "cpu":
        return (Variant("minkowski", torch.float64),)
    return tuple(Variant(backend, dtype) for backend in sparse.BACKENDS for dtype in (torch.float64, torch.float32))


def run_checks(device: str, variants: Sequence[Variant], cases: Sequence[Case]) -> Iterator[Result]:
    """Compare each layer with its references on `device`: a result for each layer and variant, the worst of all cases.

    Where a layer cannot run, its result is the last one: after an error of the GPU nothing more runs there.
    """
    maps_of_cases = [(case, case.draw_maps().to(device)) for case in cases]
    for layer in layers():
        results = {variant: Result(layer.name, device, variant) for variant in variants}
        for case, maps in maps_of_cases:
            results = _check_case(layer, case, maps, results)
            if failed := [result for result in results.values() if result.problem]:
                yield from failed
                return
        yield from results.values()


def _check_case(layer: Layer, case: Case, maps: Tensor, before: Mapping[Variant, Result]) -> dict[Variant, Result]:
    """The results of a layer so far, with one more case; up to the first variant that cannot run."""
    results = dict(before)
    # float32 means float32 here: no TF32, which torch allows itself in convolutions.
    with float32_products(tf32=False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = _draw_parameters(layer, case)
        reference, cotangent = _run_dense(layer, case, parameters, maps)
        references = [reference]
        if maps.device.type != "cpu" and case.sites() < _FEW_SITES:
            on_cpu = Variant("minkowski", torch.float64)
            references.append(_run_sparse(layer, case, on_cpu, parameters, maps.cpu(), cotangent.cpu()))
        for variant, result in before.items():
            try:
                runs = [_run_sparse(layer, case, variant, parameters, maps, cotangent) for _ in range(2)]
                results[variant] = _worse(result, case, runs, references)
            except RuntimeError as error:
                results[variant] = replace(result, case=case.name, problem=str(error).splitlines()[0])
                break
    return results


def _worse(before: Result, case: Case, runs: Sequence[Outcome], references: Sequence[Outcome]) -> Result:
    error = torch.tensor([_error(runs[0], reference) for reference in references]).max().item()
    repeatable = before.repeatable and all(torch.equal(first, runs[1][name]) for name, first in runs[0].items())
    if math.isnan(before.error) or error <= before.error:
        return replace(before, repeatable=repeatable)
    return replace(before, error=error, case=case.name, repeatable=repeatable)


def _draw_parameters(layer: Layer, case: Case) -> Outcome:
    """The layer's own random kernels, and random values for all that starts at one or zero."""
    module = layer.make(*case.channels)
    for parameter in module.parameters():
        if parameter.dim() == 1 or len(parameter) == 1:
            nn.init.normal_(parameter)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _run_dense(layer: Layer, case: Case, parameters: Outcome, maps: Tensor) -> tuple[Outcome, Tensor]:
    """What the layer must compute, and the gradient of its output that was drawn for it (float32 can hold it)."""
    device = maps.device.type
    masks = Masks(case.mask(case.stride, device), case.mask(case.stride * layer.stride, device))
    maps = maps.clone().requires_grad_()
    leaves = {name: value.to(device, torch.float64).requires_grad_() for name, value in parameters.items()}
    outcome = layer.dense(leaves, maps, masks)
    cotangent = torch.randn(outcome["output"].shape).to(device, torch.float64)
    outcome["output"].backward(cotangent)
    return outcome | _gradients({"maps": maps, **leaves}), cotangent


def _run_sparse(
    layer: Layer, case: Case, variant: Variant, parameters: Outcome, maps: Tensor, cotangent: Tensor
) -> Outcome:
    module = layer.make(*case.channels).to(maps.device, variant.dtype)
    module.load_state_dict(parameters, strict=False)  # buffers keep their beginning
    maps = maps.to(variant.dtype, copy=True).requires_grad_()
    pyramid = sparse.Pyramid(case.visible.to(maps.device), case.patch_size, variant.backend)
    output = sparse.to_dense(module(sparse.to_sparse(maps, pyramid, case.stride)))
    output.backward(cotangent.to(variant.dtype))
    leaves = {"maps": maps, **dict(module.named_parameters())}
    return {"output": output, **dict(module.named_buffers())} | _gradients(leaves)


def _gradients(leaves: Mapping[str, Tensor]) -> Outcome:
    return {
        f"gradient of {name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }


def _error(ours: Outcome, reference: Outcome) -> float:
    """The largest difference, as a share of the largest value; 0 for no difference, NaN if there is any."""
    errors = []
    for name, expected in reference.items():
        expected = expected.detach().double()
        found = ours[name].detach().to(expected.device, torch.float64)
        errors.append((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    return torch.stack([error.cpu() for error in errors]).max().item()
