"""Proof of the installed engine: its layers against dense torch on masked maps, forward and backward."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spark_me import sparse
from spark_me.devices import float32_products
from spark_me.errors import first_line

_FEW_SITES = 20_000
Tensors = dict[str, Tensor]
"""By name: a layer's parameters, or what it computed: "output", buffers, gradients of the maps and of parameters."""


@dataclass(frozen=True)
class Case:
    """Masked maps."""

    name: str
    visible: Tensor  # bool [B, fh, fw]
    patch_size: int
    stride: int  # tensor stride of the maps
    channels: tuple[int, int]  # (Cin, Cout); on them and on the number of sites depends which kernels the engine takes

    def mask(self, stride: int, device: torch.device | str = "cpu") -> Tensor:
        """1 at the active sites of a tensor stride, else 0: float64 [B, 1, H/s, W/s]."""
        side = self.patch_size // stride
        return self.visible[:, None].to(device).repeat_interleave(side, 2).repeat_interleave(side, 3).double()

    def sites(self) -> int:
        """Active sites of the maps, over all images."""
        return int(self.visible.sum()) * (self.patch_size // self.stride) ** 2

    def draw_maps(self) -> Tensor:
        """Random maps [B, Cin, H/s, W/s]: float64 that float32 can hold, with no value twice in a channel of an image.

        Two equal maxima under a kernel would leave open which of them receives the gradient.
        """
        images, _, height, width = self.mask(self.stride).shape
        places = height * width
        rank = _noise(images, self.channels[0], places, seed=0).argsort(dim=2)
        maps = (rank.double() - places / 2) / 2 ** (places.bit_length() - 2)
        return maps.view(images, -1, height, width)


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def cases_for(device: str) -> tuple[Case, ...]:
    """On the CPU one case of many masks; on a GPU all that brings other kernels into play."""
    masks = _noise(5, 3, 4, seed=0) < 0.4
    masks[0] = True
    masks[1] = False
    masks[1, -1, -1] = True
    masks[2:, 0, 0] = True
    mixed = Case("mixed masks", masks, patch_size=8, stride=1, channels=(4, 6))
    if device == "cpu":
        return (mixed,)
    one_patch = torch.zeros(1, 3, 2, dtype=torch.bool)
    one_patch[0, 1, 1] = True
    empty_borders = torch.zeros(7, 5, 6, dtype=torch.bool)  # and another share of the rest in every image
    empty_borders[:, 1:-1, 1:-1] = _noise(7, 3, 4, seed=1) < torch.linspace(0.2, 1, 7)[:, None, None]
    empty_borders[:, 2, 3] = True
    thirty_of_49 = _noise(64, 49, seed=2).argsort(dim=1).argsort(dim=1) < 30
    return (
        mixed,
        Case("a single patch", one_patch, patch_size=32, stride=2, channels=(16, 16)),
        Case("one full image", torch.ones(1, 2, 3, dtype=torch.bool), patch_size=16, stride=4, channels=(24, 48)),
        Case("empty borders", empty_borders, patch_size=32, stride=8, channels=(192, 200)),
        Case("64 images", thirty_of_49.view(64, 7, 7), patch_size=8, stride=1, channels=(32, 48)),
    )


class Layer(NamedTuple):
    """A layer and its reference.

    `make` makes the sparse layer for (Cin, Cout) channels; some ignore Cout. `dense` computes from its parameters by
    name, maps that are 0 at inactive sites and their mask the "output", of which active sites count, and buffers.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    dense: Callable[[Tensors, Tensor, Tensor], Tensors]
    stride: int = 1  # steps of the output


def layers() -> tuple[Layer, ...]:
    """Every layer whose kernels the engine, or a backend of ours in its place, computes."""
    return (
        *(_convolution(*sizes) for sizes in ((1,), (3,), (7, 2), (3, 2), (1, 2), (2, 2), (4, 4))),
        _convolution(3, groups=2),
        _convolution(3, dilation=2),
        Layer("depthwise 7×7", lambda inputs, _: sparse.Conv2d(inputs, inputs, 7, 1, 3, 1, inputs), _dense_depthwise),
        Layer("max-pool 3×3 stride 2", lambda *_: sparse.MaxPool2d(3, 2, 1), _dense_max_pool, 2),
        _average_pool(3, padding=1),
        _average_pool(2, padding=0),
        Layer("batch norm", lambda inputs, _: sparse.BatchNorm2d(inputs), _dense_batch_norm),
        Layer("layer norm", lambda inputs, _: sparse.LayerNorm(inputs, eps=1e-6), _dense_layer_norm),
        Layer("response norm", lambda inputs, _: sparse.GlobalResponseNorm(inputs), _dense_response_norm),
    )


def _convolution(size: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> Layer:
    options = {"stride": stride, "groups": groups, "dilation": dilation}
    said = "".join(f" {name} {value}" for name, value in options.items() if value > 1)
    padding = dilation * (size // 2) if size % 2 else 0

    def make(inputs: int, outputs: int) -> nn.Module:
        return sparse.Conv2d(inputs, outputs, size, stride, padding, dilation, groups, bias=False)

    def dense(parameters: Tensors, maps: Tensor, mask: Tensor) -> Tensors:
        return {"output": functional.conv2d(maps, parameters["weight"], None, padding=padding, **options)}

    return Layer(f"conv {size}×{size}{said}", make, dense, stride)


def _average_pool(size: int, padding: int) -> Layer:
    def make(*channels: int) -> nn.Module:
        return sparse.AvgPool2d(size, 2, padding, count_include_pad=False)

    def dense(parameters: Tensors, maps: Tensor, mask: Tensor) -> Tensors:
        total, count = (functional.avg_pool2d(x, size, 2, padding, divisor_override=1) for x in (maps, mask))
        return {"output": total / count.clamp(min=1)}

    return Layer(f"average pool {size}×{size} stride 2", make, dense, 2)


def _dense_depthwise(parameters: Tensors, maps: Tensor, mask: Tensor) -> Tensors:
    weight, bias = parameters["weight"], parameters["bias"]
    return {"output": functional.conv2d(maps, weight, bias, padding=3, groups=maps.shape[1])}


def _dense_max_pool(parameters: Tensors, maps: Tensor, mask: Tensor) -> Tensors:
    return {"output": functional.max_pool2d(maps.masked_fill(mask == 0, -torch.inf), 3, 2, 1)}


def _dense_batch_norm(parameters: Tensors, maps: Tensor, mask: Tensor) -> Tensors:
    active = maps.permute(0, 2, 3, 1)[mask[:, 0] > 0]  # [N, C]
    mean, variance = active.mean(0), active.var(0, unbiased=False)
    normed = (maps - _per_channel(mean)) / (_per_channel(variance) + 1e-5).sqrt()
    # PyTorch's rule: one tenth of the new mean and of the new unbiased variance, on top of 0 and 1.
    statistics = {"running_mean": 0.1 * mean.detach(), "running_var": 0.9 + 0.1 * active.detach().var(0)}
    return {"output": _affine(parameters, normed), **statistics}


def _dense_layer_norm(parameters: Tensors, maps: Tensor, mask: Tensor) -> Tensors:
    mean, variance = maps.mean(1, keepdim=True), maps.var(1, unbiased=False, keepdim=True)
    return {"output": _affine(parameters, (maps - mean) / (variance + 1e-6).sqrt())}


def _dense_response_norm(parameters: Tensors, maps: Tensor, mask: Tensor) -> Tensors:
    norm = maps.square().sum((2, 3), keepdim=True).sqrt()
    return {"output": maps + _affine(parameters, maps * norm / (norm.mean(1, keepdim=True) + 1e-6))}


def _affine(parameters: Tensors, maps: Tensor) -> Tensor:
    return maps * _per_channel(parameters["weight"]) + _per_channel(parameters["bias"])


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


class Variant(NamedTuple):
    """How a layer computes."""

    backend: str
    dtype: torch.dtype


def variants_for(device: str) -> tuple[Variant, ...]:
    """On the CPU the engine's own kernels in float64; on a GPU both backends in both dtypes that the engine has."""
    if device == "cpu":
        return (Variant("minkowski", torch.float64),)
    return tuple(Variant(backend, dtype) for backend in sparse.BACKENDS for dtype in (torch.float64, torch.float32))


@dataclass
class Result:
    """How far a layer is from its references: the worst of all cases."""

    layer: str
    device: str
    variant: Variant
    error: float = 0.0  # relative to the largest value
    case: str = ""  # where it was worst
    repeatable: bool = True  # whether two runs gave the same bits
    problem: str = ""  # why it could not run

    @property
    def ok(self) -> bool:
        """Whether they agree; a NaN does not."""
        return not self.problem and self.error <= (1e-9 if self.variant.dtype == torch.float64 else 1e-4)

    @property
    def name(self) -> str:
        """The layer and how it ran, for people."""
        return f"{self.layer} ({self.device}, {self.variant.backend}, {str(self.variant.dtype).split('.')[-1]})"

    @property
    def verdict(self) -> str:
        """The result, for people."""
        if self.problem:
            return f"FAILED {self.name}: {self.problem}, at {self.case}"
        if self.ok:
            return f"ok {self.name}: max error {self.error:.1e}"
        return f"MISMATCH {self.name}: max error {self.error:.1e}, at {self.case}"


def run_checks(device: str, variants: Sequence[Variant], cases: Sequence[Case]) -> Iterator[Result]:
    """Compare each layer with its references on `device`: a result for each layer and variant, the worst of all cases.

    Where a layer cannot run, its result is the last one: after an error of the GPU nothing more runs there.
    """
    maps_of_cases = [(case, case.draw_maps().to(device)) for case in cases]
    for layer in layers():
        results = [Result(layer.name, device, variant) for variant in variants]
        for case, maps in maps_of_cases:
            _check_case(layer, case, maps, results)
            if failed := [result for result in results if result.problem]:
                yield from failed
                return
        yield from results


def _check_case(layer: Layer, case: Case, maps: Tensor, results: Sequence[Result]) -> None:
    """Bring the results of a layer up to date with one more case; up to the first that cannot run."""
    # float32 means float32 here: no TF32, which torch allows itself in convolutions.
    with float32_products(tf32=False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = _draw_parameters(layer, case)
        reference, cotangent = _run_dense(layer, case, parameters, maps)
        references = [reference]
        if maps.device.type != "cpu" and case.sites() < _FEW_SITES:
            on_cpu = Variant("minkowski", torch.float64)
            references.append(_run_sparse(layer, case, on_cpu, parameters, maps.cpu(), cotangent.cpu()))
        for result in results:
            try:
                first, again = (_run_sparse(layer, case, result.variant, parameters, maps, cotangent) for _ in range(2))
                error = _error(first, references)
            except RuntimeError as problem:
                result.case, result.problem = case.name, first_line(problem)
                return
            result.repeatable &= all(torch.equal(value, again[name]) for name, value in first.items())
            if not (math.isnan(result.error) or error <= result.error):
                result.error, result.case = error, case.name


def _draw_parameters(layer: Layer, case: Case) -> Tensors:
    """The layer's own random kernels, and random values for all that starts at one or zero."""
    module = layer.make(*case.channels)
    for parameter in module.parameters():
        if parameter.dim() == 1 or len(parameter) == 1:
            nn.init.normal_(parameter)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _run_dense(layer: Layer, case: Case, parameters: Tensors, maps: Tensor) -> tuple[Tensors, Tensor]:
    """What the layer must compute, and the gradient of its output that was drawn for it (float32 can hold it)."""
    before, after = (case.mask(case.stride * steps, maps.device) for steps in (1, layer.stride))
    maps = maps.clone().requires_grad_()
    leaves = {name: value.to(maps.device, torch.float64).requires_grad_() for name, value in parameters.items()}
    outcome = layer.dense(leaves, maps * before, before)
    outcome["output"] = outcome["output"].masked_fill(after == 0, 0)
    cotangent = torch.randn(outcome["output"].shape).to(maps.device, torch.float64)
    outcome["output"].backward(cotangent)
    return outcome | _gradients({"maps": maps, **leaves}), cotangent


def _run_sparse(
    layer: Layer, case: Case, variant: Variant, parameters: Tensors, maps: Tensor, cotangent: Tensor
) -> Tensors:
    module = layer.make(*case.channels).to(maps.device, variant.dtype)
    module.load_state_dict(parameters, strict=False)  # buffers keep their beginning
    maps = maps.to(variant.dtype, copy=True).requires_grad_()
    pyramid = sparse.Pyramid(case.visible.to(maps.device), case.patch_size, variant.backend)
    output = sparse.to_dense(module(sparse.to_sparse(maps, pyramid, case.stride)))
    output.backward(cotangent.to(variant.dtype))
    leaves = {"maps": maps, **dict(module.named_parameters())}
    return {"output": output, **dict(module.named_buffers())} | _gradients(leaves)


def _gradients(leaves: Tensors) -> Tensors:
    return {
        f"gradient of {name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }


def _error(ours: Tensors, references: Sequence[Tensors]) -> float:
    """The largest difference, as a share of the largest value; 0 for no difference, NaN if there is any."""
    errors = []
    for name, expected in ((name, value) for reference in references for name, value in reference.items()):
        expected = expected.detach().double()
        found = ours[name].detach().to(expected.device, torch.float64)
        errors.append(((found - expected).abs().max() / expected.abs().max().clamp(min=1)).cpu())
    return torch.stack(errors).max().item()
