"""Schedules at points that are known by hand."""

import math

import pytest
import torch

from spark_me.config.tasks import PretrainConfig
from spark_me.config.training import OptimConfig
from spark_me.train.schedules import Schedule, build_schedule, describe_peak

SCHEDULE = Schedule(
    steps=111,
    warmup_steps=10,
    peak_lr=2.0,
    warmup_start_factor=0.1,
    end_factor=0.01,
    weight_decay=0.04,
    weight_decay_end=0.2,
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.2), (5, 1.1), (10, 2.0), (60, (2.0 + 0.02) / 2), (110, 0.02), (35, 0.02 + 1.98 * (0.5 + math.sqrt(0.125)))],
)
def test_learning_rate(step: int, expected: float) -> None:
    assert SCHEDULE.lr(step) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.04), (55, 0.12), (110, 0.2)])
def test_weight_decay(step: int, expected: float) -> None:
    assert SCHEDULE.decay(step) == pytest.approx(expected)


def test_learning_rate_rises_then_falls() -> None:
    rates = [SCHEDULE.lr(step) for step in range(111)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_run_of_one_step(warmup_steps: int) -> None:
    one = Schedule(1, warmup_steps, 2.0, 0.1, 0.01, 0.04, 0.2)
    assert one.lr(0) == pytest.approx(0.2 if warmup_steps else 2.0)
    assert one.decay(0) == pytest.approx(0.04)


def test_apply_sets_decay_in_decayed_groups_alone() -> None:
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2))], "decayed": True},
        {"params": [torch.nn.Parameter(torch.zeros(2))], "decayed": False},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    SCHEDULE.apply(optimizer, 55)
    assert [group["lr"] for group in optimizer.param_groups] == [SCHEDULE.lr(55)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(0.12), 0.0]


def test_a_peak_of_its_own_does_not_depend_on_the_batch() -> None:
    config = PretrainConfig(optim=OptimConfig(base_lr=None, lr=7e-4))
    assert build_schedule(config.optim, config.train, steps_per_epoch=312).lr(40 * 312) == pytest.approx(7e-4)
    assert describe_peak(config.optim, config.train.batch_size) == "lamb with peak lr 0.0007"


def test_official_recipe() -> None:
    # The official code: 2e-4 · 4096 / 256 = 3.2e-3 at the peak, from 0.005 to 0.001 of it; ImageNet has 312 such steps.
    config = PretrainConfig()
    schedule = build_schedule(config.optim, config.train, steps_per_epoch=312)
    assert schedule.lr(0) == pytest.approx(0.005 * 3.2e-3)
    assert schedule.lr(40 * 312) == pytest.approx(3.2e-3)
    assert schedule.lr(1600 * 312 - 1) == pytest.approx(0.001 * 3.2e-3)
    assert schedule.decay(1600 * 312 - 1) == pytest.approx(0.2)
