"""TIES: trim, elect signs, average what agrees (Yadav et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sparsify import Consensus, Rescale, combined, largest, shares_of, sparsified
from exapt.algebra.streamed import Parts, banded, sparse


def _streamed(
    parts: Parts, weights: Tensor | None = None, *, density: float | Sequence[float], scale: float, consensus: Consensus, normalise: bool, rescale: Rescale
) -> Iterator[Tensor]:
    shares = shares_of("density", density, len(parts))
    for trimmed in sparse(lambda: parts, shares, banded(parts, shares, lambda n, d: (n - max(int(d * n), 1), n)), rescale):
        yield scale * combined(trimmed, weights, consensus=consensus, normalise=normalise)


@rule("ties", paper="TIES-Merging: Resolving Interference When Merging Models", oracle="mergekit", streamed=_streamed)
def ties_merged(
    deltas: Tensor, weights: Tensor | None = None, *,
    density: float | Sequence[float] = 0.2, scale: float = 1.0, consensus: Consensus = "sum", normalise: bool = True, rescale: Rescale = "none",
) -> Tensor:  # fmt: skip
    r"""Trims each task vector to its largest entries, elects a sign for each entry, and averages the values that have it.

    .. math:: \tau = \lambda\, \frac{\sum_i w_i m_i \odot \hat\tau_i}{\sum_i w_i m_i}, \qquad
        m_i = \Big[\operatorname{sign}(\hat\tau_i) = \operatorname{sign}\Big(\sum_j w_j \hat\tau_j\Big)\Big]

    A tie elects plus. The paper trims and elects over the whole model at once, this rule tensor by tensor, as mergekit does.

    Args:
        deltas: Task vectors (m, ...).
        weights: (m,); by default 1 each. When normalised, only their proportions matter.
        density: Share of entries that survives the trimming, for all or for each model.
        scale: The factor :math:`\lambda`.
        consensus: ``"sum"`` of values (the paper's), ``"count"`` of models, or ``"none"``.
        normalise: Whether to average (the paper's disjoint mean), or to add.
        rescale: ``"l1"`` restores the sum of sizes after the trimming.

    Returns:
        (...).

    Raises:
        InputError: for densities out of [0, 1], or weights that add up to zero where nothing is elected and they are normalised.

    References:
        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023.

    >>> import torch
    >>> ties_merged(torch.tensor([[3.0, 0.1, -1.0, 2.0], [-1.0, 0.2, -3.0, 4.0]]), density=0.75)
    tensor([ 3.,  0., -2.,  3.])
    """
    trimmed = sparsified(deltas, density, lambda x, d: (largest(x, d), d), rescale)
    return scale * combined(trimmed, weights, consensus=consensus, normalise=normalise)
