"""RAM: add what one model alone changed, average what several did (Yuan et al., 2026)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sphere import rows_of
from exapt.algebra.streamed import Parts


def _streamed(parts: Parts, *, epsilon: float, r: float, alpha: float) -> Iterator[Tensor]:
    counts = torch.zeros(2, len(parts), dtype=torch.int64)
    for deltas in parts:
        counts += _changed(deltas, epsilon)
    return (_merged(deltas, counts, epsilon, r, alpha) for deltas in parts)


@rule("ram", paper="Behavior Knowledge Merge in Reinforced Agentic Models", oracle="mergekit", streamed=_streamed)
def ram_merged(deltas: Tensor, *, epsilon: float = 1e-5, r: float = 0.0, alpha: float = 0.2) -> Tensor:
    r"""Averages an entry over the models that changed it, so that no update is diluted by models without one; RAM+ strengthens unique ones.

    .. math:: \tau = \frac{1}{c} \sum_{i:\, |\tau_i| > \epsilon} \lambda_i^{[c = 1]} \tau_i, \qquad
        \lambda_i = 1 + r \min(\rho_i, \alpha), \qquad \rho_i = \frac{\#\text{shared entries of } i}{\#\text{unique entries of } i}

    where :math:`c` is the number of models that changed the entry. The ratio is taken in each tensor, as mergekit does, not over the whole model.

    Args:
        deltas: Task vectors (m, ...).
        epsilon: An entry that moved by no more counts as unchanged, and is dropped.
        r: Strength :math:`r` of RAM+; 0 is RAM, mergekit's ``ramplus_tl`` has 0.1.
        alpha: The largest ratio :math:`\alpha` that counts.

    Returns:
        (...).

    References:
        Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026.

    >>> ram_merged(torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 3.0]]))
    tensor([1., 3., 3.])
    """
    return _merged(deltas, _changed(deltas, epsilon), epsilon, r, alpha)


def _changed(deltas: Tensor, epsilon: float) -> Tensor:
    """How many entries each model changed that others did too, and that it alone did (2, m)."""
    changed = deltas.abs() > epsilon
    count = changed.sum(0, dtype=torch.int32)
    return torch.stack([rows_of(changed & part).sum(1) for part in (count > 1, count == 1)])


def _merged(deltas: Tensor, counts: Tensor, epsilon: float, r: float, alpha: float) -> Tensor:
    changed = deltas.abs() > epsilon
    count = changed.sum(0, dtype=torch.int32)
    shared, unique = counts.to(deltas)
    ratio = shared / unique.clamp(min=1)  # without unique entries there is nothing to strengthen
    strength = 1 + r * ratio.clamp(max=alpha)
    kept = deltas * changed
    alone = torch.where(count == 1, torch.tensordot(strength, kept, 1), kept.sum(0))  # where one model changed an entry, the sums have one term
    return alone / count.clamp(min=1)
