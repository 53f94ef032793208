"""Proof of the installed engine: its layers against dense torch on masked maps, forward and backward."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from spark_me import sparse
from spark_me.devices import float32_products
from spark_me.errors import first_line


@dataclass(frozen=True)
class Case:
    """Masked maps.

    Attributes:
        name: how messages call it.
        visible: bool [B, fh, fw].
        patch_size: P.
        stride: tensor stride of the maps.
        channels: (Cin, Cout); which kernels the engine takes depends on them and on the number of sites.
    """

    name: str
    visible: Tensor
    patch_size: int
    stride: int
    channels: tuple[int, int]

    def mask(self, stride: int, device: str = "cpu") -> Tensor:
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
        generator = torch.Generator().manual_seed(0)
        rank = torch.rand(images, self.channels[0], places, generator=generator).argsort(dim=2)
        maps = (rank.double() - places / 2) / 2 ** (places.bit_length() - 2)
        return maps.view(images, -1, height, width)


def cases_for(device: str) -> tuple[Case, ...]:
    """On the CPU one case of many masks; on a GPU all that brings other kernels into play."""
    mixed = Case("mixed masks", _mixed_masks(), patch_size=8, stride=1, channels=(4, 6))
    if device == "cpu":
        return (mixed,)
    return (
        mixed,
        Case("a single patch", _one_patch(), patch_size=32, stride=2, channels=(16, 16)),
        Case("one full image", torch.ones(1, 2, 3, dtype=torch.bool), patch_size=16, stride=4, channels=(24, 48)),
        Case("empty borders", _empty_borders(), patch_size=32, stride=8, channels=(192, 200)),
        Case("64 images", _random_masks(64, kept=30), patch_size=8, stride=1, channels=(32, 48)),
    )


def _mixed_masks() -> Tensor:
    """bool [5, 3, 4]: all visible, a single corner patch, and three random ones."""
    visible = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    visible[0] = True
    visible[1] = False
    visible[1, -1, -1] = True
    visible[2:, 0, 0] = True
    return visible


def _one_patch() -> Tensor:
    """bool [1, 3, 2] with a single visible patch, at the border."""
    visible = torch.zeros(1, 3, 2, dtype=torch.bool)
    visible[0, 1, 1] = True
    return visible


def _empty_borders() -> Tensor:
    """bool [7, 5, 6]: nothing is visible along the borders, and another share of the rest in every image."""
    share = torch.linspace(0.2, 1, 7)[:, None, None]
    visible = torch.zeros(7, 5, 6, dtype=torch.bool)
    visible[:, 1:-1, 1:-1] = torch.rand(7, 3, 4, generator=torch.Generator().manual_seed(1)) < share
    visible[:, 2, 3] = True
    return visible


def _random_masks(images: int, kept: int) -> Tensor:
    """bool [images, 7, 7] with `kept` visible patches each."""
    rank = torch.rand(images, 49, generator=torch.Generator().manual_seed(2)).argsort(dim=1).argsort(dim=1)
    return (rank < kept).view(images, 7, 7)


@dataclass(frozen=True)
class Masks:
    """1 at active sites, else 0: at the resolution of the input and of the output, [B, 1, h, w] each."""

    before: Tensor
    after: Tensor


Dense = Callable[[Mapping[str, Tensor], Tensor, Masks], dict[str, Tensor]]


@dataclass(frozen=True)
class Layer:
    """A layer and its reference.

    Attributes:
        name: how messages call it.
        make: the sparse layer for (Cin, Cout) channels; layers that keep the number of channels ignore Cout.
        dense: from the layer's parameters by name, dense maps and masks to the "output", and to buffers by their name.
        stride: steps of the output.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    dense: Dense
    stride: int = 1


def layers() -> tuple[Layer, ...]:
    """Every layer whose kernels the engine, or a backend of ours in its place, computes."""
    return (
        _convolution(1),
        _convolution(3),
        _convolution(7, stride=2),
        _convolution(3, stride=2),
        _convolution(1, stride=2),
        _convolution(2, stride=2),
        _convolution(4, stride=4),
        _convolution(3, groups=2),
        _convolution(3, dilation=2),
        Layer(
            "depthwise 7×7",
            lambda channels, _: sparse.Conv2d(channels, channels, 7, padding=3, groups=channels),
            _dense_depthwise,
        ),
        _pool("max-pool", 3, lambda: sparse.MaxPool2d(3, 2, 1), _dense_max_pool),
        _pool("average pool", 3, lambda: sparse.AvgPool2d(3, 2, 1, count_include_pad=False), _dense_average_pool),
        _pool("average pool", 2, lambda: sparse.AvgPool2d(2, 2), _dense_average_pool),
        Layer("batch norm", lambda channels, _: sparse.BatchNorm2d(channels), _dense_batch_norm),
        Layer("layer norm", lambda channels, _: sparse.LayerNorm(channels, eps=1e-6), _dense_layer_norm),
        Layer("response norm", lambda channels, _: sparse.GlobalResponseNorm(channels), _dense_response_norm),
    )


def _convolution(size: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> Layer:
    options = (("stride", stride), ("groups", groups), ("dilation", dilation))
    said = "".join(f" {name} {value}" for name, value in options if value > 1)
    padding = dilation * (size // 2) if size % 2 else 0
    return Layer(
        f"conv {size}×{size}{said}",
        lambda inputs, outputs: sparse.Conv2d(inputs, outputs, size, stride, padding, dilation, groups, bias=False),
        partial(_dense_convolution, size=size, stride=stride, groups=groups, dilation=dilation),
        stride,
    )


def _pool(name: str, size: int, make: Callable[[], nn.Module], dense: Callable[..., dict[str, Tensor]]) -> Layer:
    return Layer(f"{name} {size}×{size} stride 2", lambda *_: make(), partial(dense, size=size), stride=2)


def _dense_convolution(
    parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks, size: int, stride: int, groups: int, dilation: int
) -> dict[str, Tensor]:
    padding = dilation * (size // 2) if size % 2 else 0
    dense = functional.conv2d(maps * masks.before, parameters["weight"], None, stride, padding, dilation, groups)
    return {"output": dense * masks.after}


def _dense_depthwise(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks) -> dict[str, Tensor]:
    weight, bias = parameters["weight"], parameters["bias"]
    dense = functional.conv2d(maps * masks.before, weight, bias, padding=3, groups=maps.shape[1])
    return {"output": dense * masks.after}


def _dense_max_pool(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks, size: int) -> dict[str, Tensor]:
    seen = maps.masked_fill(masks.before == 0, -torch.inf)
    return {"output": functional.max_pool2d(seen, size, 2, size // 2).masked_fill(masks.after == 0, 0)}


def _dense_average_pool(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks, size: int) -> dict[str, Tensor]:
    total = partial(functional.avg_pool2d, kernel_size=size, stride=2, padding=(size - 1) // 2, divisor_override=1)
    return {"output": total(maps * masks.before) / total(masks.before).clamp(min=1) * masks.after}


def _dense_batch_norm(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks) -> dict[str, Tensor]:
    active = maps.permute(0, 2, 3, 1)[masks.before[:, 0] > 0]  # [N, C]
    mean, variance = active.mean(0), active.var(0, unbiased=False)
    normed = (maps - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    dense = normed * parameters["weight"][:, None, None] + parameters["bias"][:, None, None]
    # PyTorch's rule: one tenth of the new mean and of the new unbiased variance, on top of 0 and 1.
    statistics = {"running_mean": 0.1 * mean, "running_var": 0.9 + 0.1 * active.var(0)}
    return {"output": dense * masks.after} | {name: value.detach() for name, value in statistics.items()}


def _dense_layer_norm(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks) -> dict[str, Tensor]:
    mean, variance = maps.mean(1, keepdim=True), maps.var(1, unbiased=False, keepdim=True)
    normed = (maps - mean) / (variance + 1e-6).sqrt()
    dense = normed * parameters["weight"][:, None, None] + parameters["bias"][:, None, None]
    return {"output": dense * masks.after}


def _dense_response_norm(parameters: Mapping[str, Tensor], maps: Tensor, masks: Masks) -> dict[str, Tensor]:
    norm = (maps * masks.before).square().sum((2, 3), keepdim=True).sqrt()
    response = norm / (norm.mean(1, keepdim=True) + 1e-6)
    dense = parameters["weight"][:, None, None] * maps * response + parameters["bias"][:, None, None] + maps
    return {"output": dense * masks.after}


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
                results[variant] = replace(result, case=case.name, problem=first_line(error))
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
