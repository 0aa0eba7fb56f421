"""What an evaluation says: from one outcome per example to metrics, and bootstrap intervals over examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exapt.core.errors import InputError


@dataclass
class Outcome:
    """What a model did on one example.

    Attributes:
        prediction: A label, a value, a list of tags.
        target: What was right, where known.
        loss: The loss summed over the example's ``count`` targets.
        count: Its number of targets.
        extra: Further numbers, averaged with ``count`` as weight.
    """

    prediction: Any = None
    target: Any = None
    loss: float = math.nan
    count: float = 1.0
    extra: dict[str, float] | None = None


def mean_loss(outcomes: Sequence[Outcome]) -> float:
    """The loss per target."""
    return math.fsum(o.loss for o in outcomes) / max(math.fsum(o.count for o in outcomes), 1e-12)


def classification(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Accuracy, F1 averaged over the classes that occur (in targets or predictions), and loss."""
    right = sum(o.prediction == o.target for o in outcomes)
    scores = []
    for c in {o.target for o in outcomes} | {o.prediction for o in outcomes}:
        both = sum(o.prediction == c == o.target for o in outcomes)
        either = sum((o.prediction == c) + (o.target == c) for o in outcomes)
        scores.append(2 * both / either)
    return {"accuracy": right / len(outcomes), "f1": float(np.mean(scores)), "loss": mean_loss(outcomes)}


def tagging(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Entity precision, recall and F1 as ``conlleval`` counts them (seqeval), accuracy over words, and loss."""
    try:
        from seqeval.metrics import f1_score, precision_score, recall_score
    except ImportError as e:
        raise InputError('entity scores need seqeval; pip install "exapt[train]"') from e
    true, found = [o.target for o in outcomes], [o.prediction for o in outcomes]
    words = sum(len(t) for t in true)
    right = sum(a == b for t, f in zip(true, found, strict=True) for a, b in zip(t, f, strict=True))
    scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {**{k: float(f(true, found, zero_division=0)) for k, f in scores.items()}, "accuracy": right / max(words, 1), "loss": mean_loss(outcomes)}


def regression(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean squared and absolute error, coefficient of determination (NaN where the targets do not vary), and loss."""
    y = np.array([o.target for o in outcomes], dtype=float)
    error = np.array([o.prediction for o in outcomes], dtype=float) - y
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float((error**2).sum()) / spread if spread > 0 else math.nan
    return {"mse": float((error**2).mean()), "mae": float(np.abs(error).mean()), "r2": r2, "loss": mean_loss(outcomes)}


def bootstrap(pairs: Sequence[tuple[float, float]], resamples: int, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a ratio of sums over examples.

    Args:
        pairs: (numerator, denominator) of each example: (1, 1) for a right answer, (0, 1) for a wrong one.
        resamples: How often the examples are drawn again, with replacement.
        seed: Seed of the drawing.

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    >>> bootstrap([(1, 1)] * 9 + [(0, 1)], 200)
    (0.7, 1.0)
    """
    values = np.array(pairs, dtype=float)
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for i in range(resamples):
        top, bottom = values[generator.integers(0, len(values), len(values))].sum(0)
        ratios[i] = top / bottom if bottom else math.nan
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return float(low), float(high)
