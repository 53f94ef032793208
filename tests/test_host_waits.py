"""Nothing in a step of the `native` backend reads a value back from its device, so the host never waits for it.

The device is torch's `meta`: its tensors have no values, so whatever needs one (`item`, `nonzero`, a comparison as a
condition) raises. Copies to it are counted: one that is not pinned would make the host wait for a GPU.
"""

import gc
import itertools
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import contract_masks
from masked_convolutions import square_window
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import spark_me
from spark_me import sparse
from spark_me.config.training import OptimConfig, TrainConfig
from spark_me.data.datasets import Batch
from spark_me.sparse.neighbours import Neighbours, Pairs, VisiblePatches, Window
from spark_me.train import step
from spark_me.train.checkpoint import TrainState
from spark_me.train.pretrain import Pretraining
from spark_me.train.schedules import build_optimizer, build_schedule

META = torch.device("meta")
WINDOWS = [
    square_window(1, 7, 2),
    square_window(2, 3, 2),
    square_window(4, 3, 1, 2),
    square_window(8, 7),
    square_window(1, 4, 4),
    Window(2, (1, 7), 1, (1, 1), (0, 3)),
    Window(1, (3, 3), 2, (1, 1), (0, 0)),
]


class Copies(TorchDispatchMode):
    """Records the shapes of what is copied from the CPU to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == META and args[0].device != META:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs)


class NoLists(TorchFunctionMode):
    """Refuses lists as indices: they become tensors on the CPU, copied unpinned and out of sight of `Copies`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in index), f"indexed by {index}"
        return func(*args, **kwargs or {})


def halo(stride):
    return stride, (-1, -2), (8 // stride + 2, 8 // stride + 4)


def test_all_tables_are_shaped_by_the_host(visible):
    expected = Neighbours(VisiblePatches.of(visible), 8)
    with Copies() as copies:
        pyramid = sparse.Pyramid(visible, 8, "native", META)
        tables = pyramid.neighbours
        shapes = [tables.inputs_of_outputs(window).shape for window in WINDOWS]
        shapes += [tables.counts(window).shape for window in WINDOWS]
        shapes += [tables.mirrored(window).shape for window in WINDOWS]
        shapes += [tables.tiles(*halo(stride)).shape for stride in pyramid.strides]
        shapes += [tables.outside_of_tiles(*halo(stride)).shape for stride in pyramid.strides]
        for stride in pyramid.strides:
            assert tables.sites(stride) == len(pyramid.raster_index(stride)) == len(pyramid.coordinates(stride))
            assert pyramid.image_index(stride).device == META
    assert shapes == [
        *(expected.inputs_of_outputs(window).shape for window in WINDOWS),
        *(expected.counts(window).shape for window in WINDOWS),
        *(expected.mirrored(window).shape for window in WINDOWS),
        *(expected.tiles(*halo(stride)).shape for stride in pyramid.strides),
        *(expected.outside_of_tiles(*halo(stride)).shape for stride in pyramid.strides),
    ]
    mask = tuple(visible.shape)
    patches = (int(visible.sum()), 3)
    assert sorted(copies.shapes) == sorted([mask, mask, patches])  # the mask, the patches, their numbers


def test_the_guards_can_fail(visible):
    with pytest.raises(NotImplementedError):  # the mask's sites would have to be counted there
        sparse.Pyramid(visible.to(META), 8, "native")
    with Copies() as copies:
        torch.zeros(4, 5).to(META)
    assert copies.shapes == [(4, 5)]
    with pytest.raises(AssertionError, match="indexed by"), NoLists():
        torch.zeros(4, 5)[:, [2, 0]]


@pytest.mark.parametrize(
    "encoder, with_nodata",
    [("resnet18", False), ("resnet18", True), ("resnet50", False), ("convnextv2_atto", False), ("densenet121", False),
     ("timm/seresnet18", False), ("timm/resnetblur18", False), ("timm/tf_efficientnet_b0", False)],
)  # fmt: skip
def test_a_whole_step_waits_for_nothing(encoder, with_nodata, visible, monkeypatch, shallow):
    monkeypatch.setattr(Neighbours, "pairs", _pairs)
    monkeypatch.setattr(Neighbours, "pairs_to_raster", _pairs_to_raster)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # autocast knows no such device
    rate = None if encoder == "densenet121" else 0.1  # it has no stochastic depth
    model = spark_me.build_model(encoder, image_size=(96, 128), decoder_width=32, drop_path=rate).to(META)
    images = torch.empty(len(visible), 3, 96, 128, device=META)
    valid = torch.ones_like(visible) if with_nodata else None
    with Copies() as copies, NoLists():
        loss = model(images, visible, valid)
        loss.backward()
    assert loss.shape == () and all(parameter.grad is not None for parameter in model.parameters())
    # what the pyramid and its tables need (and which patches have data)
    assert len(copies.shapes) == 3 + with_nodata


class OnMeta:
    """SparK on the device without values, as a task."""

    steps_per_epoch = 10
    device = META
    normalise = staticmethod(lambda images: images)
    inputs, loss, after_step = Pretraining.inputs, Pretraining.loss, Pretraining.after_step

    def __init__(self) -> None:
        self.model = spark_me.build_model("timm/test_resnet", image_size=(96, 128), decoder_width=32).to(META)


@pytest.mark.parametrize("name, with_nodata", [("adamw", False), ("lamb", False), ("lamb", True)])
def test_a_step_of_the_trainer_waits_for_nothing_and_copies_nothing(name, with_nodata, visible, monkeypatch):
    monkeypatch.setattr(Neighbours, "pairs", _pairs)
    monkeypatch.setattr(Neighbours, "pairs_to_raster", _pairs_to_raster)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(step, "Readback", list)  # what is on its way back; it is read when it has arrived
    task, scaler = OnMeta(), torch.amp.GradScaler("cpu", enabled=False)
    precision = SimpleNamespace(device=META, autocast=nullcontext(), scaler=scaler)
    state = TrainState(task.model, build_optimizer(task.model, OptimConfig(name=name)), scaler)
    schedule = build_schedule(OptimConfig(), TrainConfig(), steps_per_epoch=10)
    stepper = step.Stepper(task, state, schedule, precision, seed=0, clip_norm=5.0)  # type: ignore[arg-type]
    images = torch.empty(len(visible), 3, 96, 128, device=META)
    valid = torch.ones_like(visible) if with_nodata else None
    for number in (1, 2):
        batch = Batch(images, list(range(len(visible))), [], visible=visible, valid=valid)
        prepared = stepper.prepare([batch])
        assert prepared.targets == (~visible).sum()
        with Copies() as copies:
            taken = stepper.take(prepared, prepared.targets)
        assert not copies.shapes
        assert taken.step == state.step == number and len(taken.values) == 2


def _pairs(self: Neighbours, window: Window) -> list[Pairs]:
    """One pair for each offset: on a GPU kernels read the tables themselves, and how many there are does not matter."""
    offsets = itertools.product(*map(range, window.size))
    return [Pairs(offset, *torch.zeros(2, 1, dtype=torch.long, device=META)) for offset in offsets]


def _pairs_to_raster(self: Neighbours, stride: int, kernel_size: int) -> list[Pairs]:
    return _pairs(self, square_window(stride, kernel_size))


@pytest.mark.parametrize("encoder", ["resnet18", "convnextv2_atto"])
def test_a_pyramid_ends_with_its_step(encoder, backend, monkeypatch):
    """With the garbage collector off: no cycle of references keeps tables alive, so none pile up on a GPU."""
    alive: list[weakref.ref] = []

    class Watched(sparse.Pyramid):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            alive.extend([weakref.ref(self), weakref.ref(self.neighbours)])

    monkeypatch.setattr("spark_me.spark.Pyramid", Watched)
    model = spark_me.build_model(encoder, image_size=(64, 64), decoder_width=32, backend=backend)
    images = torch.randn(2, 3, 64, 64)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            model(images).backward()
        assert [one() for one in alive] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("encoder", ["resnet18", "convnextv2_atto"])
def test_no_host_wait_on_a_gpu(encoder):
    model = spark_me.build_model(encoder, image_size=(96, 128), decoder_width=32, drop_path=0.1).cuda()
    visible = contract_masks()
    images = torch.randn(len(visible), 3, 96, 128, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images, visible)
        loss.backward()

    step()  # kernels are compiled and chosen, which does wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_memory_does_not_grow_from_step_to_step():
    model = spark_me.build_model("resnet18", image_size=(96, 128), decoder_width=32).cuda()
    images = torch.randn(4, 3, 96, 128, device="cuda")
    held = []
    for _ in range(5):
        model(images).backward()
        model.zero_grad()
        held.append(torch.cuda.memory_allocated())
    assert held[1:] == held[1:2] * 4
