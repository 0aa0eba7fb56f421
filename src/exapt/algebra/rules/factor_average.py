"""Averages of LoRA's factors, beside the average of what they multiply to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exapt.algebra.lowrank import LowRank, concatenated, weighed
from exapt.core.components import component
from exapt.core.errors import InputError


@dataclass(frozen=True)
class FactorAverage:
    r"""What averaging factors gives.

    Attributes:
        merged: The product of the averaged factors, of the terms' rank.
        exact: The weighted sum of the products.
        cross: Their difference ``merged - exact``: the cross terms :math:`w_i w_j B_i A_j` and what is missing of the weights.
        relative: Its Frobenius norm over that of ``exact``: how far the merged adapter is from the average of the models.
    """

    merged: LowRank
    exact: LowRank
    cross: LowRank
    relative: float


@component("factor_averaged", kind="low-rank merge", oracle="NumPy and PEFT")
def factor_averaged(terms: Sequence[LowRank], weights: Sequence[float] | None = None, *, root: bool = False) -> FactorAverage:
    r"""The product of averaged factors :math:`\bar B \bar A = (\sum_i w_i B_i)(\sum_i w_i A_i)`, and how far it is from
    :math:`\sum_i w_i B_i A_i`.

    Federated averaging of adapters works on the factors: it keeps the rank, but is not the average of the models. For weights that add up to
    one the difference is :math:`-\tfrac12 \sum_{ij} w_i w_j (B_i - B_j)(A_i - A_j)`; it vanishes where one factor is the same in all.

    Args:
        terms: Adapters of one shape and rank.
        weights: One for each; by default 1 / m.
        root: Whether the factors get the weights' square roots, :math:`\bar B \bar A = (\sum_i \sqrt{w_i} B_i)(\sum_i \sqrt{w_i} A_i)`, so that
            each :math:`B_i A_i` keeps its weight, as PEFT's combination "linear" does; the weights must not be negative then.

    Returns:
        :class:`FactorAverage`.

    Raises:
        InputError: for terms that cannot be added or differ in rank (:func:`~exapt.algebra.lowrank.concatenated` takes those); for negative
            weights with ``root``.

    >>> one, two = LowRank(torch.ones(1, 1), torch.ones(1, 1)), LowRank(-torch.ones(1, 1), -torch.ones(1, 1))
    >>> found = factor_averaged([one, two])  # the same update twice, cancelled in its factors
    >>> found.merged.dense().item(), found.exact.dense().item(), found.relative
    (0.0, 1.0, 1.0)
    """
    exact = concatenated(terms, w := weighed(terms, [1 / max(len(terms), 1)] * len(terms) if weights is None else weights, "factor_averaged"))
    if len({t.rank for t in terms}) > 1:
        raise InputError(f"factor_averaged: the ranks are {[t.rank for t in terms]}; factors of one rank can be averaged, others go through concatenated")
    if root and min(w) < 0:
        raise InputError(f"factor_averaged: root=True takes square roots of the weights {w}; give weights from 0, or root=False")
    shares = torch.tensor([math.sqrt(x) if root else x for x in w], dtype=exact.B.dtype, device=exact.B.device)
    merged = LowRank(*(torch.tensordot(shares, torch.stack([getattr(t, factor) for t in terms]), 1) for factor in ("B", "A")))
    cross, size = merged - exact, exact.norm()
    return FactorAverage(merged, exact, cross, cross.norm() / size if size else math.nan)
