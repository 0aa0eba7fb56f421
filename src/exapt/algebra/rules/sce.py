"""SCE: select, calculate, erase (Wan et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sparsify import agreeing, shares_of, smallest
from exapt.algebra.sphere import rows_of
from exapt.algebra.streamed import Parts, cuts
from exapt.core.errors import InputError


def _streamed(parts: Parts, *, density: float, floor: float) -> Iterator[Tensor]:
    share = _checked(density, parts)

    def variances() -> Iterator[Tensor]:
        return (deltas.var(0, correction=0, keepdim=True) for deltas in parts)

    if share < 1:
        count = int(sum(int(v.count_nonzero()) for v in variances()) * share)
        (cut,) = cuts(variances, [[parts.elements - count]], parts.elements)

    def selected() -> Iterator[Tensor]:
        marker = cut.marker() if share < 1 else None
        for deltas in parts:
            yield deltas if marker is None else deltas.mul_(~marker(0, deltas.var(0, correction=0)))

    squares = sum((deltas.double().square().sum(1) for deltas in selected()), torch.zeros(len(parts), dtype=torch.float64))
    w = _weights(squares / parts.elements, floor).to(parts.dtype)
    yield from (_erased(deltas, w) for deltas in selected())


@rule("sce", paper="FuseChat: Knowledge Fusion of Chat Models", oracle="mergekit", streamed=_streamed)
def sce_merged(deltas: Tensor, *, density: float = 1.0, floor: float = 0.0) -> Tensor:
    r"""Selects the entries in which models differ most, weighs models by the energy left, and erases what is against the elected sign.

    .. math:: \tau = \frac{\sum_i w_i m_i \odot \hat\tau_i}{\sum_i w_i m_i}, \qquad w_i = \frac{\lVert \hat\tau_i \rVert^2}{\sum_j \lVert \hat\tau_j \rVert^2}

    with :math:`m_i` as in TIES, and :math:`\hat\tau_i` the task vectors in the entries of largest variance over models.

    Args:
        deltas: Task vectors (m, ...).
        density: Share of the entries with any variance that is selected; 1 selects all entries.
        floor: Where the mean squares of all models add up to less than this, models weigh the same (mergekit: 1e-6, which small updates do not reach).

    Returns:
        (...).

    Raises:
        InputError: for a density out of [0, 1], or one model where entries are selected.

    References:
        Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024.

    >>> sce_merged(torch.tensor([[2.0, 1.0], [1.0, -1.0]]))
    tensor([1.7143, 1.0000])
    """
    share = _checked(density, deltas)
    if share < 1:
        variance = deltas.var(0, correction=0)
        count = int(int(variance.count_nonzero()) * share)
        deltas = torch.where(smallest(variance, variance.numel() - count), 0.0, deltas)
    return _erased(deltas, _weights(rows_of(deltas).square().sum(1) / max(deltas[0].numel(), 1), floor))


def _checked(density: float, models: Sized) -> float:
    (share,) = shares_of("density", density, 1)
    if share < 1 and len(models) < 2:
        raise InputError("sce selects entries by their variance over models, and there is one model; give more, or density=1")
    return share


def _weights(energy: Tensor, floor: float) -> Tensor:
    total = energy.sum()
    return energy / total if float(total) > floor else torch.full_like(energy, 1 / len(energy))


def _erased(deltas: Tensor, w: Tensor) -> Tensor:
    mask = agreeing(deltas, "sum").to(deltas)
    below = torch.tensordot(w, mask, 1)
    return torch.tensordot(w, mask * deltas, 1) / below.clamp(min=torch.finfo(below.dtype).tiny)
