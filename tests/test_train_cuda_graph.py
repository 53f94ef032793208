"""A step that is recorded and repeated is the step, bit by bit: by a recorder that does what a graph does."""

import logging

import pytest
import torch
from graph_recorder import Recorder, recording
from tiny_runs import RESNET, SMALL
from torch import nn

import spark_me
from spark_me import sparse
from spark_me.config.data import DataConfig
from spark_me.config.loading import parse_config
from spark_me.config.tasks import ModelConfig, PretrainConfig, PretrainTrainConfig
from spark_me.config.training import OptimConfig
from spark_me.data.datasets import Batch
from spark_me.errors import UserError
from spark_me.masking import draw_visible
from spark_me.train import cuda_graph
from spark_me.train.checkpoint import TrainState
from spark_me.train.cuda_graph import GraphedSteps
from spark_me.train.distributed import Precision
from spark_me.train.pretrain import Pretraining, graph_obstacle
from spark_me.train.schedules import build_optimizer, build_schedule
from spark_me.train.step import Stepper

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STEPS = 7


class Task:
    """SparK on noise."""

    steps_per_epoch = STEPS
    normalise = staticmethod(lambda images: images)
    inputs, loss, after_step = Pretraining.inputs, Pretraining.loss, Pretraining.after_step

    def __init__(self, encoder, device, decoder="unet", drop_path=0.2):
        self.device = device
        torch.manual_seed(0)
        self.model = spark_me.build_model(
            encoder, image_size=(64, 96), decoder_width=32, drop_path=drop_path, decoder=decoder
        ).to(device)
        self.grid = self.model.grid


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Algorithms that GPUs have, too: the CPU's own counts pairs of neighbours. And bf16 is bf16."""
    monkeypatch.setattr("spark_me.train.distributed.cpu_multiplies_bfloat16", lambda: True)
    with sparse.choose("tiles", "dense"):
        yield


def stepper_of(encoder, precision="fp32", device=CPU, **options):
    task = Task(encoder, device, **options)
    optim = OptimConfig(name="lamb", base_lr=0.5, warmup_epochs=0, clip_norm=1.0)
    precision = Precision(precision, device)
    state = TrainState(task.model, build_optimizer(task.model, optim, capturable=True), precision.scaler)
    schedule = build_schedule(optim, PretrainTrainConfig(epochs=1, batch_size=256), STEPS)
    return Stepper(task, state, schedule, precision, seed=0, clip_norm=1.0)


def batches_of(step, stepper, micro_batches=1, images=4):
    """Those of a step: other images and masks every time."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(micro_batches):
        pixels = torch.randn(images, 3, 64, 96, generator=generator)
        visible = draw_visible(images, stepper.task.grid, 0.6, generator=generator)
        yield Batch(pixels, list(range(images)), [], visible=visible)


def run(stepper, steps=STEPS, **options):
    """Loss and norm of each step, and the weights, statistics and averages at the end."""
    values = []
    for step in range(steps):
        prepared = stepper.prepare(list(batches_of(step, stepper, **options)))
        values.append(stepper.take(prepared, prepared.targets).values.read())
    return values, [tensor.clone() for tensor in cuda_graph._changing(stepper.state)]


def graphed(stepper):
    steps = GraphedSteps(stepper.compute, stepper.state, recording(stepper.state))
    stepper.compute = steps.take
    return steps


@pytest.mark.parametrize(
    "encoder, options",
    [
        (RESNET, {}),
        (RESNET, {"precision": "bf16"}),
        (SMALL, {}),
        ("convnextv2_atto", {"decoder": "block"}),
        ("timm/seresnet18", {"drop_path": 0.0}),
    ],
)
def test_repeated_steps_are_the_steps_bit_by_bit(encoder, options, shallow):
    """Other images, masks, rates and random numbers in every one of them."""
    expected = run(stepper_of(encoder, **options))
    stepper = stepper_of(encoder, **options)
    steps = graphed(stepper)
    replays = []
    repeat = steps._repeat
    steps._repeat = lambda inputs: replays.append(len(inputs)) or repeat(inputs)
    actual = run(stepper)
    assert not steps.obstacle and len(replays) == STEPS - cuda_graph.WARM_UP + 1  # one of them the trial
    assert actual[0] == expected[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual[1], expected[1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("encoder", [RESNET, "convnextv2_atto"])
def test_on_a_gpu_a_graph_takes_the_steps(encoder, precision):
    expected, _ = run(stepper_of(encoder, precision, CUDA))
    stepper = stepper_of(encoder, precision, CUDA)
    steps = GraphedSteps(stepper.compute, stepper.state)
    stepper.compute = steps.take
    actual, _ = run(stepper)
    assert steps._replay and not steps.obstacle
    assert torch.tensor(actual).sub(torch.tensor(expected)).abs().max() < 5e-2


def test_micro_batches_are_one_graph():
    expected, stepper = run(stepper_of(SMALL), micro_batches=2), stepper_of(SMALL)
    steps = graphed(stepper)
    actual = run(stepper, micro_batches=2)
    assert steps._replay and actual[0] == expected[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual[1], expected[1], strict=True))


def test_a_smaller_batch_goes_without_the_graph_and_the_next_with_it():
    results = []
    for with_graph in (False, True):
        stepper = stepper_of(SMALL)
        steps = graphed(stepper) if with_graph else None
        first = run(stepper)
        smaller = run(stepper, steps=1, images=2)
        assert steps is None or (steps._replay and not steps.obstacle)
        results.append((first, smaller, run(stepper, steps=2)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours[0] == theirs[0]
        assert all(torch.equal(one, other) for one, other in zip(ours[1], theirs[1], strict=True))


class Stale(nn.Module):
    """A layer with a fault that a graph would keep."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.fault(x, self.calls)


FAULTS = {
    "a host's number": lambda x, call: x * (1 + call),
    "a host's random number": lambda x, call: x * torch.rand((), generator=torch.Generator().manual_seed(call)).item(),
    "what the host read": lambda x, call: x * x.abs().max().item(),
    "a shape that depends on values": lambda x, call: x * x[x > 0].sum(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_would_repeat_something_old_is_not_used(fault, caplog):
    """The trial finds it, or the capture refuses; the run goes on as if there had been none."""

    def faulty():
        stepper = stepper_of(SMALL)
        decoder = stepper.task.model.decoder
        layer = Stale(FAULTS[fault])
        decoder.register_forward_hook(lambda module, inputs, out: layer(out))
        return stepper, layer

    stepper, _ = faulty()
    expected = run(stepper, steps=cuda_graph.WARM_UP + 1)
    stepper, _ = faulty()
    steps = graphed(stepper)
    with caplog.at_level(logging.WARNING):
        actual = run(stepper, steps=cuda_graph.WARM_UP + 3)
    assert steps.obstacle and not steps._replay
    (message,) = (record.message for record in caplog.records)
    assert message.startswith("the run goes on without a CUDA graph (train.cuda_graph): ")
    assert actual[0][: cuda_graph.WARM_UP] == expected[0][: cuda_graph.WARM_UP]


@pytest.mark.parametrize("what", ["images", "masks", "rates", "seed"])
def test_the_trial_would_notice_what_does_not_reach_the_graph(what, monkeypatch, caplog):
    stepper = stepper_of(RESNET, drop_path=0.8)
    steps = graphed(stepper)
    repeat = steps._repeat

    def stale(inputs):
        tensors = [list(one.tensors) for one in inputs]
        rates = cuda_graph._rates(stepper.state)
        if what == "images":
            tensors[0][0] = steps._inputs[0].tensors[0].clone()
        elif what == "masks":
            tensors[0][1:] = [x.clone() for x in steps._inputs[0].tensors[1:]]
        elif what == "rates":
            torch._foreach_div_(rates, 2)
        else:
            torch.manual_seed(1)
        values = repeat([one._replace(tensors=tuple(own)) for one, own in zip(inputs, tensors)])
        if what == "rates":
            torch._foreach_mul_(rates, 2)
        return values

    monkeypatch.setattr(steps, "_repeat", stale)
    expected = run(stepper_of(RESNET, drop_path=0.8))
    with caplog.at_level(logging.WARNING):
        actual = run(stepper)
    assert "in a trial its step was off" in steps.obstacle
    assert actual[0] == expected[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual[1], expected[1], strict=True))


def test_the_recorder_can_fail():
    recorder = Recorder()
    x = torch.ones(3)
    with recorder:
        y = (x * 2).add_(1).view(3, 1)
    x.fill_(5)
    recorder.replay()
    assert y.flatten().tolist() == [11, 11, 11]
    with Recorder(), pytest.raises(RuntimeError, match="not permitted"):
        x.sum().item()


@pytest.mark.parametrize(
    "changed, device, what",
    [
        ({}, CPU, "a CPU"),
        ({"train": PretrainTrainConfig(cuda_graph="never")}, CUDA, "train.cuda_graph=never"),
        ({"train": PretrainTrainConfig(precision="fp16")}, CUDA, "train.precision=fp16"),
        ({"train": PretrainTrainConfig(activation_checkpointing=True)}, CUDA, "train.activation_checkpointing"),
        ({"data": DataConfig(nodata=0.0)}, CUDA, "data.nodata"),
        ({"model": ModelConfig(backend="minkowski")}, CUDA, "model.backend=minkowski"),
    ],
)
def test_what_stands_in_the_way_is_said(changed, device, what):
    assert graph_obstacle(PretrainConfig(**changed), device).startswith(what)


def test_what_one_gpu_computes_at_a_fixed_ratio_goes_into_a_graph(monkeypatch):
    assert not graph_obstacle(PretrainConfig(), CUDA)
    monkeypatch.setattr("spark_me.train.distributed.world_size", lambda: 2)
    assert graph_obstacle(PretrainConfig(), CUDA) == "several processes exchange gradients"


def test_another_value_is_refused():
    with pytest.raises(UserError, match=r"train.cuda_graph=always .*: must be auto or never"):
        parse_config("train: {cuda_graph: always}\ndata: {root: .}", "x.yaml")
