"""Two classifiers on frozen features: the nearest neighbours' vote, and logistic regression."""

import importlib.util
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spark_me.errors import UserError, install_text
from spark_me.inference.labelled import balanced_part

TEMPERATURE = 0.07
"""Of the neighbours' weights (arXiv 1805.01978, section 3.4)."""
STRENGTHS = tuple(10.0**power for power in range(-4, 4))
"""Inverse strengths C of the regularisation that are tried, the strongest first."""
HELD_OUT = 0.2
"""Share of each class that the strength is chosen on."""
CHUNK = 1024
"""Test images whose similarities are held at once."""


class Linear(NamedTuple):
    """A linear probe's result."""

    scores: Tensor
    """float64 [n, number of classes]: probabilities."""
    strength: float
    """The inverse strength C."""
    chosen: bool
    """Whether C was chosen on held-out images; else it is 1, because each class has a single one."""


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int) -> Tensor:
    """Votes of the k training images of largest cosine similarity s, each with the weight exp(s / 0.07).

    Args:
        train: features [m, C].
        labels: int64 [m].
        test: features [n, C].
        classes: how many there are.
        k: at most m.

    Returns:
        float32 [n, classes], each row's votes as shares.
    """
    train, test = functional.normalize(train), functional.normalize(test)
    votes = []
    for chunk in test.split(CHUNK):
        similarity, neighbours = (chunk @ train.T).topk(k, dim=1)
        weights = (similarity / TEMPERATURE).softmax(dim=1)
        votes.append(torch.zeros(len(chunk), classes).scatter_add_(1, labels[neighbours], weights))
    return torch.cat(votes)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Linear:
    """Multinomial logistic regression on standardised features.

    C is the one that classifies most of a held-out fifth of the training images, the smallest of equals; the regression
    is then fitted to all of them.

    Args:
        train: features [m, C].
        labels: int64 [m], every class among them.
        test: features [n, C].
        seed: decides what is held out.
    """
    inputs, targets = train.double().numpy(), labels.numpy()
    strength = _choose_strength(inputs, targets, seed)
    model = _regression(strength or 1.0).fit(inputs, targets)
    scores = torch.from_numpy(model.predict_proba(test.double().numpy()))
    return Linear(scores, strength or 1.0, strength is not None)


def _choose_strength(inputs: np.ndarray, targets: np.ndarray, seed: int) -> float | None:
    """The best C; None if no class can spare an image."""
    spare = np.flatnonzero(np.bincount(targets)[targets] > 1)
    if not len(spare):
        return None
    held_out = spare[balanced_part(targets[spare], HELD_OUT, seed)]
    kept = np.setdiff1d(np.arange(len(targets)), held_out)
    correct = {
        strength: _regression(strength).fit(inputs[kept], targets[kept]).score(inputs[held_out], targets[held_out])
        for strength in STRENGTHS
    }
    return max(correct, key=lambda strength: correct[strength])


def require_sklearn() -> None:
    """Refuse to begin without scikit-learn.

    Raises:
        UserError: if it is missing.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(f"the linear probe needs scikit-learn: {install_text('probe')}")


def _regression(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
