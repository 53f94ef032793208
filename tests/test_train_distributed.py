"""Processes and micro-batches together take the steps of one process with the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TOLERANCE
from tiny_runs import SMALL, take_step, write_config, write_images
from torch import Tensor, multiprocessing, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spark_me.config.loading import load_config
from spark_me.data.datasets import Batch
from spark_me.data.files import find_files
from spark_me.data.sampler import Share
from spark_me.data.unreadable import UnreadableFiles
from spark_me.errors import UserError
from spark_me.train import distributed
from spark_me.train.checkpoint import TrainState
from spark_me.train.distributed import Precision
from spark_me.train.pretrain import Pretraining
from spark_me.train.schedules import build_optimizer, build_schedule
from spark_me.train.step import Inputs, Stepper, split_batch

CPU = torch.device("cpu")
STEPS = 3

# Name: processes, dtype, optimizer, micro-batches of a process, whether norms keep their statistics.
# In float32 an adaptive optimizer turns gradients that are zero but for rounding, such as a bias's before a norm, into
# whole steps in a random direction; SGD is as exact as its gradients. Norms see a micro-batch at a time, so that only
# without their batch statistics accumulation is exact.
CASES = {
    "fp32": (2, torch.float32, "sgd", 1, False),
    "fp64": (2, torch.float64, "lamb", 1, False),
    "accumulate": (2, torch.float64, "lamb", 2, True),
    "four": (4, torch.float64, "lamb", 1, False),
}


class UnevenPretraining(Pretraining):
    """Hides 1 to 3 of the 4 patches, by sample: processes must not take their own mean for everyone's."""

    dtype = torch.float32
    frozen_norms = False
    epoch = 0

    def inputs(self, batch: Batch) -> Inputs:
        generators = (torch.Generator().manual_seed(100 * self.epoch + index) for index in batch.indices)
        orders = [torch.randperm(4, generator=generator) for generator in generators]
        visible = torch.stack([order <= index % 3 for index, order in zip(batch.indices, orders)]).view(-1, 2, 2)
        (images, *patches), targets = super().inputs(batch._replace(visible=visible))
        return Inputs((images.to(self.dtype), *patches), targets)

    def loss(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        if self.frozen_norms:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return super().loss(model, *tensors)


def take_steps(name: str, path: Path, *, alone: bool) -> tuple[list[float], float, dict[str, Tensor]]:
    """Losses, held-out loss and weights after the steps of a case."""
    _, dtype, optimizer_name, accumulate, frozen = CASES[name]
    overrides = [f"train.accumulate={1 if alone else accumulate}", f"train.epochs={STEPS}", "model.image_size=[16,16]"]
    if optimizer_name == "sgd":
        overrides.append("optim.base_lr=5")  # steps far above float32's rounding
    config = load_config(path, overrides)
    task = UnevenPretraining(config, find_files(config.data), CPU)
    task.model.to(dtype)
    task.dtype, task.frozen_norms = dtype, frozen
    optimizer = build_optimizer(task.model, config.optim)
    if optimizer_name == "sgd":
        optimizer = torch.optim.SGD(optimizer.param_groups, momentum=0.9)
    precision = Precision("fp32", CPU)
    state = TrainState(task.model, optimizer, precision.scaler)
    stepper = Stepper(task, state, build_schedule(config.optim, config.train, 1), precision, seed=0, clip_norm=5.0)
    place = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    share = Share(config.train.batch_size, STEPS, config.run.seed, accumulate=config.train.accumulate, **place)
    batches = iter(task.batches(share, 0))
    losses = []
    for task.epoch in range(STEPS):  # of one step each
        micro_batches = [next(batches) for _ in range(config.train.accumulate)]
        losses.append(take_step(stepper, micro_batches)["loss"])
    weights = {key: value.clone() for key, value in task.model.state_dict().items()}
    task.model.float()
    held_out = task.evaluate(UnreadableFiles({}, 10, 0, print), precision.autocast)["held_out_loss"]
    return losses, held_out, weights


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for name, (world_size, *_) in CASES.items():
        if rank < world_size:
            store = dist.FileStore(str(folder / f"{name}.store"), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            torch.save(take_steps(name, folder / "tiny.yaml", alone=False), folder / f"{name}_{rank}")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all cases and processes."""
    folder = tmp_path_factory.mktemp("distributed")
    path = write_config(folder / "tiny.yaml", write_images(folder / "images"), encoder=SMALL, batch_size=8)
    path.write_text(path.read_text().replace("drop_path: 0.1", "drop_path: 0.0").replace("adamw", "lamb"))
    multiprocessing.start_processes(worker, (folder,), nprocs=4, start_method="fork")  # which imports nothing again
    return folder


@pytest.mark.parametrize("name", CASES)
def test_processes_and_micro_batches_equal_one_big_batch(folder: Path, name: str, one_thread: None) -> None:
    world_size, dtype, *_ = CASES[name]
    expected = take_steps(name, folder / "tiny.yaml", alone=True)
    assert len(set(expected[0])) == STEPS  # it learns something
    results = [torch.load(folder / f"{name}_{rank}") for rank in range(world_size)]
    for losses, held_out, weights in results:
        torch.testing.assert_close(losses, expected[0], rtol=0, atol=TOLERANCE[dtype])
        assert held_out == pytest.approx(expected[1], rel=TOLERANCE[torch.float32])  # measured in float32
        for key, value in expected[2].items():
            torch.testing.assert_close(weights[key], value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=key)
    # Processes never drift apart.
    for key, value in results[0][2].items():
        assert all(torch.equal(weights[key], value) for _, _, weights in results), key


def test_a_batch_that_does_not_split_names_the_nearest_that_do() -> None:
    assert split_batch(16, 2, 4) == 2
    with pytest.raises(UserError, match=r"batch_size=20 .* 2 processes × train.accumulate=4: .* is 16 and 24"):
        split_batch(20, 2, 4)
    with pytest.raises(UserError, match="nearest that does is 8"):
        split_batch(3, 2, 4)
