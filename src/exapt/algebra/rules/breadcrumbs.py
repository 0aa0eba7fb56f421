"""Model Breadcrumbs: task vectors without their outliers and their smallest entries (Davari and Belilovsky, ECCV 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sparsify import Consensus, Rescale, band, combined, shares_of, sparsified, without_outliers
from exapt.algebra.streamed import Parts, banded, sparse


def _streamed(
    parts: Parts, weights: Tensor | None = None, *, density: float | Sequence[float], gamma: float, scale: float, consensus: Consensus, normalise: bool,
    rescale: Rescale,
) -> Iterator[Tensor]:  # fmt: skip
    (top,) = shares_of("gamma", gamma, 1)
    shares = shares_of("density", density, len(parts))
    for crumbs in sparse(lambda: parts, shares, banded(parts, shares, lambda n, d: band(n, d, top)), rescale):
        yield scale * combined(crumbs, weights, consensus=consensus, normalise=normalise)


@rule("breadcrumbs", paper="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", oracle="mergekit", streamed=_streamed)
def breadcrumbs_merged(
    deltas: Tensor, weights: Tensor | None = None, *,
    density: float | Sequence[float] = 0.9, gamma: float = 0.01, scale: float = 1.0, consensus: Consensus = "none", normalise: bool = False,
    rescale: Rescale = "none",
) -> Tensor:  # fmt: skip
    r"""Sets the share :math:`\gamma` of each tensor's largest entries and then its smallest to zero, and adds: :math:`\lambda \sum_i w_i m_i \odot \tau_i`.

    Args:
        deltas: Task vectors (m, ...).
        weights: (m,); by default 1 each.
        density: Share of entries to keep, for all or for each model; 1 keeps the outliers too.
        gamma: Share of the largest that is left out; less where density + gamma > 1. The paper gives both bounds as quantiles.
        scale: The factor :math:`\lambda`.
        consensus: ``"none"`` adds; ``"sum"`` and ``"count"`` elect signs first, as TIES does.
        normalise: Whether to divide by the sum of weights.
        rescale: ``"l1"`` restores the sum of sizes.

    Returns:
        (...).

    Raises:
        InputError: for shares out of [0, 1], or weights that add up to zero where they are normalised.

    References:
        Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024.

    >>> import torch
    >>> breadcrumbs_merged(torch.tensor([[9.0, -2.0, 0.1, 1.0]]), density=0.5, gamma=0.25)
    tensor([ 0., -2.,  0.,  1.])
    """
    (top,) = shares_of("gamma", gamma, 1)
    crumbs = sparsified(deltas, density, lambda x, d: (without_outliers(x, d, top), d), rescale)
    return scale * combined(crumbs, weights, consensus=consensus, normalise=normalise)
