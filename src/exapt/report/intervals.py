"""Accuracies with bootstrap intervals, paired comparisons, and the parts of a drop under shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exapt.core.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval.

    >>> Interval(0.5, 0.4, 0.6).contains(0.45)
    True
    """

    value: float
    low: float
    high: float

    def contains(self, x: float) -> bool:
        """Whether ``x`` lies in the interval, ends included."""
        return self.low <= x <= self.high

    def percent(self, sign: bool = False) -> str:
        """As text in percent (of a difference: percentage points).

        >>> Interval(0.953, 0.94, 0.965).percent(), Interval(-0.02, -0.03, 0.0).percent(sign=True)
        ('95.3 [94.0, 96.5]', '-2.0 [-3.0, +0.0]')
        """
        form = "+.1f" if sign else ".1f"
        value, low, high = (format(100 * v + 0.0, form) for v in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def _draws(size: int, draws: int, seed: int) -> NDArray[np.int64]:
    if size == 0:
        raise InputError("a bootstrap interval needs at least one row, none was given")
    return np.random.default_rng(seed).integers(0, size, (draws, size))


def _interval(value: float, replicates: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def _right(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"expected one value per row, got an array of shape {array.shape}")
    return array


def accuracy(correct: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Returns the mean of ``correct`` with its percentile bootstrap interval (rows are resampled with replacement).

    Args:
        correct: (n,) one 0 or 1 (or score) per row.
        draws: Number of resamples.
        seed: Seed of the resampling.
        level: Share of the resamples that the interval covers.

    Raises:
        InputError: if there are no rows.

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", Chapman and Hall, 1993, chapter 13.

    >>> accuracy([1, 1, 1, 0], seed=0).value
    0.75
    """
    right = _right(correct)
    return _interval(right.mean() if right.size else 0.0, right[_draws(right.size, draws, seed)].mean(1), level)


def compare(first: ArrayLike, second: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Returns the difference of two accuracies on the same rows, ``first - second``, with its paired bootstrap interval.

    Both are resampled together, so what makes a row hard for both does not widen the interval.

    Raises:
        InputError: if the two do not have the same number of rows.

    >>> compare([1, 1, 0, 1], [1, 0, 0, 1]).value
    0.25
    """
    a, b = _right(first), _right(second)
    if a.size != b.size:
        raise InputError(f"a paired comparison needs the same rows on both sides, got {a.size} and {b.size}")
    return accuracy(a - b, draws=draws, seed=seed, level=level)


@dataclass(frozen=True)
class Decomposition:
    """Accuracy before and under a shift, the drop, and its parts; ``drop`` is ``inputs + mix`` exactly."""

    source: Interval
    changed: Interval
    target: Interval
    inputs: Interval
    mix: Interval
    drop: Interval


def decompose(
    source: ArrayLike, changed: ArrayLike, member: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Decomposition:  # fmt: skip
    """Splits the change of accuracy under a shift of both inputs and class mix into two parts that add up.

    The same rows are seen with their old inputs and with their new ones; the stream is the subset of them whose classes
    have the new mix. ``inputs`` is accuracy with new inputs minus accuracy with old inputs, at the old mix; ``mix`` is
    what taking the stream's rows instead of all of them adds, at the new inputs. All intervals come from the same
    resamples of rows. The order (inputs first) is a choice: the other order can give other parts of the same drop.

    Args:
        source: (n,) whether each row is right with its old input.
        changed: (n,) whether each row is right with its new input.
        member: (n,) whether the row is in the stream.

    Raises:
        InputError: if the lengths differ or the stream is empty.

    >>> d = decompose([1, 1, 1, 1], [1, 1, 0, 0], [False, True, True, True])
    >>> d.inputs.value, round(d.mix.value, 4), round(d.drop.value, 4)
    (-0.5, -0.1667, -0.6667)
    """
    a, b, m = _right(source), _right(changed), _right(member)
    if not a.size == b.size == m.size:
        raise InputError(f"the three arrays must describe the same rows, got {a.size}, {b.size} and {m.size}")
    if not m.any():
        raise InputError("the stream is empty: no row is a member")
    index = _draws(a.size, draws, seed)
    index = index[m[index].any(1)]

    def three(rows: Any) -> tuple[Any, Any, Any]:
        chosen = m[rows]
        return a[rows].mean(-1), b[rows].mean(-1), (b[rows] * chosen).sum(-1) / chosen.sum(-1)

    (s, c, t), (rs, rc, rt) = three(np.arange(a.size)), three(index)
    parts = ((s, rs), (c, rc), (t, rt), (c - s, rc - rs), (t - c, rt - rc), (t - s, rt - rs))
    return Decomposition(*(_interval(value, replicates, level) for value, replicates in parts))


def confusion(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> NDArray[np.int64]:
    """Returns counts (classes, classes): rows are the true classes, columns the predicted ones.

    Raises:
        InputError: for a label that is not listed.

    >>> confusion(["a", "b", "b"], ["a", "a", "b"], ["a", "b"]).tolist()
    [[1, 0], [1, 1]]
    """
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for t, p in zip(truth, predicted, strict=True):
        if t not in place or p not in place:
            raise InputError(f"the label {t if t not in place else p!r} is not one of {', '.join(labels)}")
        counts[place[t], place[p]] += 1
    return counts
