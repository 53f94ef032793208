"""Our LAMB and AdamW against timm's and torch's: numbers, state, what a CUDA graph may hold, and how they resume."""

import sys
import weakref
from copy import deepcopy
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from spark_me import build_model
from spark_me.config.training import LambConfig, OptimConfig
from spark_me.train.optimizers import AdamW, Lamb
from spark_me.train.schedules import Schedule, build_optimizer

SHAPES = [(8, 4, 3, 3), (6, 6, 1, 1), (40, 30), (7,), (1,), ()]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": None},
    {"bias_correction": False, "max_grad_norm": 0.1},
    {"always_adapt": True, "max_grad_norm": 1e7},
]
SCHEDULE = Schedule(20, 5, 0.1, 0.1, 0.01, 0.0, 0.2)
"""Without decay in the first step."""


def make_groups(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Decayed or not, each with weights of zeros and, the last, one that never has a gradient."""
    torch.manual_seed(0)
    return [
        {
            "params": [*(nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES)]
            + [nn.Parameter(torch.zeros(3, 2, dtype=dtype)) for _ in range(2)],
            "decayed": decayed,
        }
        for decayed in (True, False)
    ]


def take_steps(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        SCHEDULE.apply(optimizer, step)
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            for parameter in group["params"][:-1]:
                parameter.grad = torch.randn_like(parameter) * 10 ** (step % 3 - 1)
            group["params"][4].grad.zero_()  # one whose update is zero, too
        optimizer.step()


def with_tensors(optimizer: Optimizer) -> Optimizer:
    """Its rates and decays as a CUDA graph wants them."""
    for group in optimizer.param_groups:
        keys = ("lr", "weight_decay") if group["decayed"] else ("lr",)
        group |= {key: torch.zeros((), dtype=torch.float64) for key in keys}
    return optimizer


def assert_same(first: Optimizer, second: Optimizer, tolerance: float) -> None:
    """Parameters, each relative to its largest value."""
    for one, other in zip(first.param_groups, second.param_groups, strict=True):
        for value, expected in zip(one["params"], other["params"], strict=True):
            assert (value - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_lamb_is_timms(options: dict[str, Any], capturable: bool, dtype: torch.dtype, tolerance: float) -> None:
    theirs = timm.optim.Lamb(make_groups(dtype), betas=(0.9, 0.95), **options)
    ours = Lamb(make_groups(dtype), betas=(0.9, 0.95), capturable=capturable, **options)
    take_steps(theirs, range(20))
    take_steps(with_tensors(ours) if capturable else ours, range(20))
    assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize("capturable", [False, True])
def test_lamb_and_timms_go_on_from_each_others_state(capturable: bool) -> None:
    def ours(groups: list[dict[str, Any]]) -> Optimizer:
        return Lamb(groups, capturable=capturable)

    uninterrupted = timm.optim.Lamb(make_groups(torch.float64))
    take_steps(uninterrupted, range(9))
    for makers in [(ours, timm.optim.Lamb), (timm.optim.Lamb, ours), (ours, ours)]:
        groups = make_groups(torch.float64)
        first, second = (make(deepcopy(groups)) for make in makers)
        assert first.param_groups[0].keys() - {"step"} == second.param_groups[0].keys()
        take_steps(first, range(4))
        for mine, other in zip(second.param_groups, first.param_groups, strict=True):
            for parameter, value in zip(mine["params"], other["params"], strict=True):
                parameter.data.copy_(value)
        second.load_state_dict(first.state_dict())
        take_steps(second, range(4, 9))
        assert_same(second, uninterrupted, 1e-12)


def test_lamb_goes_on_from_a_count_of_an_older_timm() -> None:
    saved = timm.optim.Lamb(make_groups(torch.float64)).state_dict()
    for group in saved["param_groups"]:
        group["step"] = 7
    optimizer = Lamb(make_groups(torch.float64))
    optimizer.load_state_dict(saved)
    take_steps(optimizer, range(1))
    assert [float(group["step"]) for group in optimizer.param_groups] == [8.0, 8.0]


def test_gradients_stay_as_they_are() -> None:
    optimizer = Lamb(make_groups(torch.float64), max_grad_norm=1e-3)
    take_steps(optimizer, range(1))
    torch.manual_seed(0)
    first = optimizer.param_groups[0]["params"][0]
    assert torch.equal(first.grad, torch.randn_like(first) * 10**-1)


class Temporaries(TorchDispatchMode):
    """The most bytes of tensors made in it that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        tensors = result if isinstance(result, list | tuple) else [result]
        if not func._schema.is_mutable:
            self.made += [weakref.ref(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
        alive = [tensor for ref in self.made if (tensor := ref()) is not None]
        self.most = max(self.most, sum(tensor.nbytes for tensor in alive))
        return result


@pytest.mark.parametrize("options", OPTIONS)
def test_lamb_needs_two_copies_of_the_parameters_at_most(options: dict[str, Any]) -> None:
    optimizer = with_tensors(Lamb([{**make_groups(torch.float64)[0]}], capturable=True, **options))
    take_steps(optimizer, range(1))  # makes the averages
    with Temporaries() as temporaries:
        optimizer.step()
    largest = sum(parameter.nbytes for parameter in optimizer.param_groups[0]["params"])
    assert largest < temporaries.most < 2.1 * largest


class Operations(TorchDispatchMode):
    """Records what is launched, with the host's numbers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [*args, *(kwargs or {}).values()]
        numbers = [value for value in values if isinstance(value, int | float)]
        assert all(value.device.type == "meta" for value in values if isinstance(value, Tensor))
        self.launched.append((str(func), numbers))
        return func(*args, **kwargs or {})


def launched_by_steps(optimizer: Optimizer) -> list[list[tuple[str, list[Any]]]]:
    """Of three steps, each with its own learning rate and decay, which are set outside of what is recorded."""
    steps = []
    for number in range(3):
        SCHEDULE.apply(optimizer, number)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        with Operations() as operations:
            optimizer.step()
        steps.append(operations.launched)
    return steps


@pytest.mark.parametrize("name, always_adapt", [("lamb", False), ("lamb", True), ("adamw", False)])
def test_a_captured_step_has_nothing_of_the_host(
    name: str, always_adapt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device without values: nothing is read back, nothing comes from the CPU, and no number changes."""
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda **_: ["meta"])
    lamb, counts = LambConfig(max_grad_norm=1.0, always_adapt=always_adapt), []
    for layers in (2, 5):
        model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(layers)), nn.BatchNorm2d(3)).to("meta")
        optimizer = build_optimizer(model, OptimConfig(name=name, lamb=lamb), capturable=True)
        if name == "adamw":
            for group in optimizer.param_groups:
                group["foreach"] = True  # as on GPUs, which the fused kernel is for
        first, second, third = launched_by_steps(optimizer)
        assert second == third != []
        counts.append(len(second))
    assert counts[0] == counts[1]  # whatever the number of parameters


def test_the_guards_can_fail() -> None:
    layer = nn.Linear(2, 2, device="meta")
    groups = [{"params": list(layer.parameters()), "decayed": True}]
    with pytest.raises(AssertionError):  # it counts on the CPU
        launched_by_steps(torch.optim.AdamW(groups, foreach=True))
    _, second, third = launched_by_steps(Lamb(groups, capturable=True))  # lr and weight_decay are the host's
    assert second != third


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_with_a_tensor_of_decay_is_torchs(fused: bool) -> None:
    theirs = torch.optim.AdamW(make_groups(torch.float64), lr=0.0)
    ours = AdamW(make_groups(torch.float64), lr=0.0, fused=fused)
    with_tensors(ours)
    take_steps(theirs, range(20))
    take_steps(ours, range(20))
    assert_same(ours, theirs, 1e-12)
    assert [type(group["weight_decay"]) for group in ours.param_groups] == [Tensor, float]


def test_a_scaler_leaves_a_step_out_with_its_decay() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = AdamW([{"params": [weight], "decayed": True}], lr=0.1, fused=True)
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for value, expected in [(float("inf"), 1.0), (2.0, 0.85)]:  # decay 0.05, then a first step of lr
        weight.grad = torch.full((2,), value)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(weight.detach(), torch.full((2,), expected))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).double()


def drop_gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def torchs_adamw(model: nn.Module) -> Optimizer:
    """As it was made before it was fused."""
    groups = build_optimizer(model, OptimConfig(name="adamw")).param_groups
    keys = ("params", "decayed", "lr_scale")
    return torch.optim.AdamW([{key: group[key] for key in keys} for group in groups], lr=0.0, betas=(0.9, 0.95))


def test_adamw_goes_on_from_the_state_of_torchs() -> None:
    model = small_model()
    optimizer, saved, weights = torchs_adamw(model), {}, {}
    for step in range(6):
        if step == 3:
            saved, weights = deepcopy(optimizer.state_dict()), deepcopy(model.state_dict())
        SCHEDULE.apply(optimizer, step)
        drop_gradients(model, step)
        optimizer.step()
    other = small_model()
    other.load_state_dict(weights)
    resumed = build_optimizer(other, OptimConfig(name="adamw"))
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        SCHEDULE.apply(resumed, step)
        drop_gradients(other, step)
        resumed.step()
    for value, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("flag", ["fused", "capturable"])
def test_adamws_flags_are_its_own_and_place_the_counts(flag: str) -> None:
    """On meta in place of a GPU: it is another device than that of the checkpoint's counts."""
    model = small_model()
    before = torchs_adamw(model)
    drop_gradients(model, 0)
    before.step()
    saved = before.state_dict()
    assert not any(saved["param_groups"][0][key] for key in ("fused", "foreach", "capturable"))
    assert {state["step"].device.type for state in saved["state"].values()} == {"cpu"}
    optimizer = build_optimizer(small_model().to("meta"), OptimConfig(name="adamw"))
    for group in optimizer.param_groups:
        group[flag] = True
    optimizer.load_state_dict(saved)
    assert [group[flag] for group in optimizer.param_groups] == [True, True]
    steps = [state["step"] for state in optimizer.state.values()]
    assert {(step.device.type, step.dtype) for step in steps} == {("meta", torch.float32)} and len(steps) == 6
    # A checkpoint of a GPU goes on without these flags.
    after = build_optimizer(small_model(), OptimConfig(name="adamw"))
    after.load_state_dict({**saved, "param_groups": [{**group, flag: True} for group in saved["param_groups"]]})
    assert not any(group[flag] for group in after.param_groups)


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_a_checkpoint_does_not_tell_of_a_graph(name: str) -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(name=name), capturable=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    SCHEDULE.apply(optimizer, 7)
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))  # in place
    assert [float(rate) for rate in rates] == [pytest.approx(SCHEDULE.lr(7))] * 2
    saved = optimizer.state_dict()
    expected = [(SCHEDULE.lr(7), SCHEDULE.decay(7)), (SCHEDULE.lr(7), 0.0)]
    for group, pair in zip(saved["param_groups"], expected, strict=True):
        assert (group["lr"], group["weight_decay"]) == pytest.approx(pair)
        assert type(group["lr"]) is type(group["weight_decay"]) is float
    plain = build_optimizer(model, OptimConfig(name=name))
    assert plain.state_dict()["param_groups"][0].keys() == saved["param_groups"][0].keys()
    plain.load_state_dict(saved)
    assert all(type(group["lr"]) is float for group in plain.param_groups)
    optimizer.load_state_dict(saved)
    assert all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_averages_lie_in_memory_as_their_parameters(name: str) -> None:
    """A fused kernel demands it, and a checkpoint's lie as its parameters did."""
    model = small_model()
    before = build_optimizer(model, OptimConfig(name=name))
    drop_gradients(model, 0)
    before.step()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    after = build_optimizer(model, OptimConfig(name=name))
    after.load_state_dict(before.state_dict())
    for parameter in model.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert after.state[parameter][key].stride() == parameter.stride()
            assert torch.equal(after.state[parameter][key], before.state[parameter][key])


@pytest.mark.parametrize(
    "encoder, decoder", [("timm/test_resnet", "unet"), ("convnextv2_atto", "block"), ("timm/test_byobnet", "unet")]
)
def test_gradients_lie_in_memory_as_their_parameters(encoder: str, decoder: str) -> None:
    """A fused kernel demands it."""
    model = build_model(encoder, image_size=(64, 64), decoder=decoder, decoder_width=32)
    model(torch.randn(2, 3, 64, 64)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        axes = [axis for axis, size in enumerate(parameter.shape) if size > 1]
        assert all(parameter.grad.stride(axis) == parameter.stride(axis) for axis in axes), name
        assert parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last), name
