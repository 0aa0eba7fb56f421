"""How sure a choice between candidates is: the bootstrap over validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.algebra.choose.rows import checked_rows
from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError


@dataclass(frozen=True)
class Choice:
    """One candidate of several, and how sure that is.

    Attributes:
        best: The index of the candidate with the highest mean score; the first of those that tie.
        scores: Mean scores (k,).
        shares: How often each candidate is the best of a bootstrap sample (k,), ties shared evenly: the choice stands to a new sample of rows
            with probability ``shares[best]``.
        interval: Percentile interval of the best's mean score.
        lead: Interval of its lead over the candidate that comes second; below zero, the two cannot be told apart.
        plausible: The fewest candidates, most frequent first, that are the best in ``level`` of the samples.
        level: Of the intervals.
        rows: Number of validation rows.
    """

    best: int
    scores: Tensor
    shares: Tensor
    interval: tuple[float, float]
    lead: tuple[float, float]
    plausible: tuple[int, ...]
    level: float
    rows: int

    @property
    def tied(self) -> tuple[int, ...]:
        """All candidates with the best's score."""
        return tuple(torch.nonzero(self.scores == self.scores[self.best]).flatten().tolist())


@component("bootstrap_choice", kind="weight choice", oracle="exact enumeration of all samples")
def bootstrap_choice(scores: Sequence[Tensor] | Tensor, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Choice:
    r"""Chooses the candidate with the highest mean score over validation rows, and says how sure the choice is.

    The rows are drawn again, with replacement, ``draws`` times; all candidates are scored on the same rows, so that what they get right or
    wrong together does not count as uncertainty.

    Args:
        scores: (k, n), each candidate's score on each row, higher better: correct or not, minus the loss, minus the entropy.
        draws: Number of bootstrap samples.
        level: Of the percentile intervals.
        seed: Of the samples.

    Returns:
        :class:`Choice`.

    Raises:
        InputError: for no candidate, scores of unequal length or not finite, draws below 1, a level outside (0, 1).

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.

    >>> found = bootstrap_choice(torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]))
    >>> found.best, found.scores.tolist(), found.interval
    (0, [0.75, 0.25], (0.25, 1.0))
    """
    rows = [checked_rows(s, "bootstrap_choice") for s in scores]
    if not rows or len({len(r) for r in rows}) > 1:
        raise InputError(f"bootstrap_choice: {len(rows)} candidates with {sorted({len(r) for r in rows})} rows; score each on the same rows")
    if draws < 1 or not 0 < level < 1:
        raise InputError(f"bootstrap_choice: draws is {draws} and level {level}; give at least 1 draw and a level between 0 and 1")
    table = torch.stack(rows).double()
    k, n = table.shape
    generator, means = seeded(seed, "bootstrap_choice"), []
    for start in range(0, draws, 256):  # in parts: a part of 256 x n counts at a time
        count = min(256, draws - start)
        drawn = torch.randint(n, (count, n), generator=generator)
        means.append(torch.zeros(count, n, dtype=torch.double).scatter_add_(1, drawn, torch.ones(count, n, dtype=torch.double)) @ table.T / n)
    samples, own = torch.cat(means), table.mean(1)
    best = int(torch.nonzero(own >= own.max() - 1e-12)[0])  # the first of those that tie, whatever the order of summation
    wins = (samples >= samples.amax(1, keepdim=True) - 1e-12).double()
    shares = (wins / wins.sum(1, keepdim=True)).mean(0)
    order = sorted(range(k), key=lambda i: (-float(shares[i]), i))
    enough = int((shares[order].cumsum(0) < level - 1e-12).sum()) + 1
    second = max((i for i in range(k) if i != best), key=lambda i: float(own[i]), default=best)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)
    low, high = (torch.quantile(x, tails).tolist() for x in (samples[:, best], samples[:, best] - samples[:, second]))
    return Choice(best, own.float(), shares.float(), (low[0], low[1]), (high[0], high[1]), tuple(order[: min(enough, k)]), level, n)
