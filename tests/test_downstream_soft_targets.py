"""Soft targets and their losses against loops in float64."""

import math

import pytest
import torch

from spark_me.config.tasks import FinetuneTrainConfig
from spark_me.downstream.finetune import SoftTargets

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
LABELS = torch.tensor([0, 2])


def smoothed(label: int, share: float, classes: int = 3) -> list[float]:
    return [share / classes + (1 - share if index == label else 0) for index in range(classes)]


def test_cross_entropy_of_smoothed_targets() -> None:
    targets = SoftTargets(FinetuneTrainConfig(label_smoothing=0.1), 3)
    images, hard = targets.mix(torch.zeros(2, 3, 4, 4), LABELS)
    expected = 0.0
    for row, label in zip(LOGITS.tolist(), LABELS.tolist()):
        total = math.log(sum(math.exp(value) for value in row))
        expected += sum(share * (total - value) for value, share in zip(row, smoothed(label, 0.1))) / 2
    assert targets.loss(LOGITS, hard).item() == pytest.approx(expected, rel=1e-4)


def test_binary_cross_entropy_is_summed_over_classes() -> None:
    targets = SoftTargets(FinetuneTrainConfig(loss="bce", label_smoothing=0.1), 3)
    _, hard = targets.mix(torch.zeros(2, 3, 4, 4), LABELS)
    expected = 0.0
    for row, label in zip(LOGITS.tolist(), LABELS.tolist()):
        for value, share in zip(row, smoothed(label, 0.1)):
            right = 1 / (1 + math.exp(-value))
            expected -= (share * math.log(right) + (1 - share) * math.log(1 - right)) / 2
    assert targets.loss(LOGITS, hard).item() == pytest.approx(expected, rel=1e-4)


def test_mixup_mixes_images_and_targets_by_the_same_share() -> None:
    mixing = SoftTargets(FinetuneTrainConfig(mixup=0.8), 3)
    torch.manual_seed(0)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    mixed, targets = mixing.mix(images, torch.tensor([0, 1, 2, 0]))
    assert targets.sum(dim=1) == pytest.approx(torch.ones(4), rel=1e-4)
    # Image 1 (of value 1 and class 1) is mixed with image 0 (of value 0 and class 0).
    assert mixed[1].unique() == pytest.approx(targets[1, 1].item(), rel=1e-4)
    assert 0 < targets[1, 1] < 1


def test_cutmix_target_is_the_share_of_the_area() -> None:
    mixing = SoftTargets(FinetuneTrainConfig(cutmix=1.0), 3)
    torch.manual_seed(1)
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    mixed, targets = mixing.mix(images, torch.tensor([0, 1]))
    assert mixed[1, 0].mean().item() == pytest.approx(targets[1, 1].item(), rel=1e-4)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}


def test_both_take_turns() -> None:
    mixing = SoftTargets(FinetuneTrainConfig(mixup=0.8, cutmix=1.0), 3)
    torch.manual_seed(0)
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    cut = sum(len(mixing.mix(images, torch.tensor([0, 1]))[0][1].unique()) == 2 for _ in range(200))
    assert 60 < cut < 120  # some boxes are empty or whole
