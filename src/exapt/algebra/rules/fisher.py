"""Fisher merging: averages weighted by the models' diagonal Fisher information (Matena and Raffel, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.rules.average import averaged
from exapt.core.errors import InputError


@rule("fisher", paper="Merging Models with Fisher-Weighted Averaging", entrywise=True)
def fisher_weighted(
    models: Tensor, weights: Tensor | None = None, statistics: Sequence[Tensor] | None = None, *, floor: float = 1e-6, favour_first: bool = False
) -> Tensor:
    r"""Every entry's mean weighted by its Fisher information: :math:`\sum_i w_i F_i \odot \theta_i \,/\, \sum_i w_i F_i`.

    The Fishers come from :func:`exapt.algebra.statistics.diagonal_fisher`; the official code divides each by its norm over the whole model
    first (:func:`exapt.algebra.statistics.unit_norm`). A tensor without Fisher (a buffer) is averaged.

    Args:
        models: (m, ...).
        weights: (m,), not negative; by default 1 each.
        statistics: Fishers (...) of every model.
        floor: Least Fisher of an entry, which decides where no model cares.
        favour_first: Whether only the first model has the floor, so that entries that no model cares about stay its own (the official default).

    Returns:
        (...).

    Raises:
        InputError: for a floor that is not positive, negative weights or Fishers, or Fishers of another shape.

    References:
        Matena, Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022.

    >>> fisher_weighted(torch.tensor([[1.0], [4.0]]), statistics=[torch.tensor([2.0]), torch.tensor([1.0])])
    tensor([2.])
    """
    if floor <= 0:
        raise InputError(f"fisher: floor {floor} must be positive, as it decides where every Fisher is zero")
    if statistics is None:
        return averaged(models, weights)
    w = models.new_ones(len(models)) if weights is None else weights
    if any(s.shape != models.shape[1:] for s in statistics):
        raise InputError(f"fisher: Fishers {[tuple(s.shape) for s in statistics]} for tensors {tuple(models.shape[1:])}; each needs its model's shape")
    f = torch.stack([s.to(models) for s in statistics])
    if bool((f < 0).any()) or bool((w < 0).any()) or not float(w.sum()) > 0:
        raise InputError("fisher: weights and Fishers must not be negative, nor all weights zero")
    least = torch.full_like(w, floor)
    if favour_first:
        least[1:] = 0
    shape = (-1, *[1] * (models.dim() - 1))
    f = w.reshape(shape) * torch.maximum(f, least.reshape(shape))
    total = f.sum(0)
    return torch.where(total > 0, (f * models).sum(0) / total.clamp(min=torch.finfo(total.dtype).tiny), averaged(models, w))
