"""RAM: add what one model alone changed, average what several did (Yuan et al., 2026)."""

from __future__ import annotations

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sphere import rows_of


@rule("ram", paper="Behavior Knowledge Merge in Reinforced Agentic Models", oracle="mergekit")
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
    changed = deltas.abs() > epsilon
    count = changed.sum(0)
    shared, unique = (rows_of(changed & part).sum(1).to(deltas) for part in (count > 1, count == 1))
    ratio = shared / unique.clamp(min=1)  # without unique entries there is nothing to strengthen
    strength = (1 + r * ratio.clamp(max=alpha)).reshape(-1, *[1] * (deltas.ndim - 1))
    kept = torch.where(changed, deltas, 0.0)
    return torch.where(count == 1, strength * kept, kept).sum(0) / count.clamp(min=1)
