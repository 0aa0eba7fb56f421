"""How compatible an update is with the model before it: negative flips and their kin, with paired bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError

PAPER = "MUSCLE: A Model Update Strategy for Compatible LLM Evolution"


@dataclass(frozen=True)
class Measured:
    """A mean over rows with its interval.

    Attributes:
        value: The mean.
        low, high: Percentile interval over resampled rows. Where all rows are 0 or all are 1 resampling shows no spread: the far end is then the
            exact binomial (Clopper-Pearson) limit.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Compatibility:
    """An update against the model before it.

    Attributes:
        negative: Share of rows that the old model had right and the new one has wrong (negative flip rate).
        positive: Share of rows that became right.
        inconsistent: Share of rows that are wrong now and were answered otherwise before (the extended flips, negative ones included).
        changed: Share of rows whose answer changed at all.
        gain: Accuracy of the new model minus that of the old: positive minus negative.
        flips: 1 for each row with a negative flip (n,), for :func:`flip_reduction`.
    """

    negative: Measured
    positive: Measured
    inconsistent: Measured
    changed: Measured
    gain: Measured
    flips: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class Gradual:
    """An update measured by scores, where answers are neither right nor wrong.

    Attributes:
        worse, better: Shares of rows whose score fell and rose.
        regression, improvement: Mean size of the falls and of the rises, over the rows that fell and rose; zero where there are none.
        change: Mean change of the score.
    """

    worse: Measured
    better: Measured
    regression: float
    improvement: float
    change: Measured


@component("update_compatibility", kind="transfer", paper=PAPER, oracle="NumPy")
def update_compatibility(old: Tensor, new: Tensor, labels: Tensor, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Compatibility:
    r"""Measures flips of predictions when a model is updated.

    .. math:: \mathrm{NFR} = \frac1n \sum_i 1[\hat y^{old}_i = y_i \ne \hat y^{new}_i], \qquad
        \mathrm{NFR}_{mc} = \frac1n \sum_i 1[\hat y^{new}_i \ne y_i]\, 1[\hat y^{old}_i \ne \hat y^{new}_i]

    Args:
        old: Predictions of the old model (n,), or its logits (n, classes).
        new: Those of the new model, in the same order.
        labels: (n,).
        draws: Bootstrap samples; rows are drawn, each with both models' answers.
        level: Of the intervals.
        seed: Of the samples.

    Returns:
        :class:`Compatibility`.

    Raises:
        InputError: for no rows or other numbers of them, no draws, or a level outside (0, 1).

    References:
        Echterhoff, Faghri, Vemulapalli, Hu, Li, Tuzel and Pouransari, "MUSCLE: A Model Update Strategy for Compatible LLM Evolution", Findings of
        EMNLP 2024 (section 3); the negative flip rate is that of Yan et al., "Positive-Congruent Training", CVPR 2021.

    >>> found = update_compatibility(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 0, 0]))
    >>> found.negative.value, found.inconsistent.value, found.changed.value, found.gain.value
    (0.25, 0.5, 0.5, -0.25)
    """
    before, after = (x.argmax(-1) if x.dim() == 2 else x for x in (old.cpu(), new.cpu()))
    y = labels.cpu()
    if not before.shape == after.shape == y.shape or y.dim() != 1 or not len(y):
        raise InputError(
            f"update_compatibility: {tuple(before.shape)} old and {tuple(after.shape)} new predictions for labels {tuple(y.shape)}; give one for each"
        )
    was, now, other = before == y, after == y, before != after
    rows = torch.stack([was & ~now, ~was & now, ~now & other, other]).double()
    negative, positive, inconsistent, changed, gain = _measured(torch.cat([rows, rows[1:2] - rows[:1]]), draws, level, seed, shares=4)
    return Compatibility(negative, positive, inconsistent, changed, gain, rows[0].float())


@component("score_compatibility", kind="transfer", paper=PAPER, oracle="NumPy")
def score_compatibility(old: Tensor, new: Tensor, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Gradual:
    r"""Measures an update by scores of generated answers: :math:`D_i = S(\hat y^{new}_i, y_i) - S(\hat y^{old}_i, y_i)`.

    Args:
        old: Each row's score under the old model (n,), higher better: ROUGE, BLEU, a judge's.
        new: Under the new model.
        draws, level, seed: As for :func:`update_compatibility`.

    Returns:
        :class:`Gradual`.

    Raises:
        InputError: as :func:`update_compatibility`, and for scores that are not finite.

    References:
        Echterhoff et al., "MUSCLE: A Model Update Strategy for Compatible LLM Evolution", Findings of EMNLP 2024 (section 3.2).

    >>> found = score_compatibility(torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0.7, 0.1, 1.0]))
    >>> round(found.regression, 3), round(found.improvement, 3), round(found.worse.value, 3)
    (0.4, 0.2, 0.333)
    """
    if old.shape != new.shape or old.dim() != 1 or not len(old) or not bool(torch.isfinite(old - new).all()):
        raise InputError(f"score_compatibility: scores of shapes {tuple(old.shape)} and {tuple(new.shape)}; give one finite number for each row and model")
    d = (new - old).double().cpu()
    worse, better, change = _measured(torch.stack([(d < 0).double(), (d > 0).double(), d]), draws, level, seed, shares=2)
    fell, rose = d[d < 0], d[d > 0]
    return Gradual(worse, better, float(-fell.mean()) if len(fell) else 0.0, float(rose.mean()) if len(rose) else 0.0, change)


@component("flip_reduction", kind="transfer", paper=PAPER, oracle="NumPy")
def flip_reduction(plain: Compatibility, compatible: Compatibility, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Measured:
    r"""What compatibility training does to negative flips: :math:`\Delta\mathrm{NFR}_c = \mathrm{NFR}_c - \mathrm{NFR}`, below zero if it helps.

    Args:
        plain: The new model against the old, on some rows.
        compatible: The compatible model against the same old model, on the same rows.
        draws, level, seed: As for :func:`update_compatibility`.

    Returns:
        The difference of the rates with its interval over resampled rows.

    Raises:
        InputError: for other numbers of rows.

    References:
        Echterhoff et al., "MUSCLE: A Model Update Strategy for Compatible LLM Evolution", Findings of EMNLP 2024 (section 5.3).

    >>> y, old = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    >>> flip_reduction(update_compatibility(old, 1 - old, y), update_compatibility(old, old, y)).value
    -1.0
    """
    if len(plain.flips) != len(compatible.flips):
        raise InputError(f"flip_reduction: {len(plain.flips)} and {len(compatible.flips)} rows; measure both updates on the same rows")
    return _measured((compatible.flips - plain.flips).double()[None], draws, level, seed)[0]


def _measured(rows: Tensor, draws: int, level: float, seed: int, shares: int = 0) -> list[Measured]:
    """Means of (k, n) over rows, with intervals of the same resampled rows for all; the first ``shares`` are of zeros and ones."""
    if draws < 1 or not 0 < level < 1:
        raise InputError(f"compatibility: {draws} draws at level {level}; give at least 1 draw and a level between 0 and 1")
    n, generator, means = rows.shape[1], seeded(seed, "compatibility"), []
    for begin in range(0, draws, 256):
        drawn = torch.randint(n, (min(256, draws - begin), n), generator=generator)
        means.append(torch.zeros(len(drawn), n, dtype=torch.double).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.double)) @ rows.T / n)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)
    limits = torch.quantile(torch.cat(means), tails, dim=0).T.tolist()
    rare = 1 - ((1 - level) / 2) ** (1 / n)
    found = []
    for i, (row, (low, high)) in enumerate(zip(rows, limits, strict=True)):
        value = float(row.mean())
        found.append(Measured(value, 1 - rare if i < shares and value == 1 else low, rare if i < shares and value == 0 else high))
    return found
