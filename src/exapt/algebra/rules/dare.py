"""DARE: drop entries of task vectors at random and rescale the rest (Yu et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sparsify import Consensus, Rescale, combined, drawn, shares_of, sparsified
from exapt.algebra.streamed import Mark, Parts, generators, sparse


def _streamed(
    parts: Parts, weights: Tensor | None, generator: torch.Generator, *, density: float | Sequence[float], scale: float, consensus: Consensus, normalise: bool,
    rescale: Rescale,
) -> Iterator[Tensor]:  # fmt: skip
    shares = shares_of("density", density, len(parts))
    positioned = generators(generator, shares, parts.elements)

    def begin() -> Mark:
        draws = positioned()
        return lambda i, x: (drawn(torch.full_like(x, shares[i]), draws[i]), shares[i])

    for dropped in sparse(lambda: parts, shares, begin, rescale):
        yield scale * combined(dropped, weights, consensus=consensus, normalise=normalise)


@rule(
    "dare", paper="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", oracle="mergekit", streamed=_streamed
)  # fmt: skip
def dare_merged(
    deltas: Tensor, weights: Tensor | None = None, generator: torch.Generator | None = None, *,
    density: float | Sequence[float] = 0.5, scale: float = 1.0, consensus: Consensus = "none", normalise: bool = False, rescale: Rescale = "density",
) -> Tensor:  # fmt: skip
    r"""Keeps each entry with probability :math:`d` and divides it by :math:`d`, so that the expectation stays; then adds, or merges as TIES does.

    .. math:: \tau = \lambda \sum_i w_i\, \frac{m_i \odot \tau_i}{d}, \qquad m_i \sim \mathrm{Bernoulli}(d)

    The paper's drop rate is :math:`p = 1 - d`.

    Args:
        deltas: Task vectors (m, ...).
        weights: (m,); by default 1 each.
        generator: Of the masks.
        density: Share of entries to keep, for all or for each model.
        scale: The factor :math:`\lambda`.
        consensus: ``"none"`` adds; ``"sum"`` and ``"count"`` elect signs first, as TIES does.
        normalise: Whether to divide by the sum of weights.
        rescale: ``"density"`` (the paper's), ``"l1"`` (mergekit 0.1.5: the sum of sizes stays what it was) or ``"none"``.

    Returns:
        (...).

    Raises:
        InputError: for densities out of [0, 1], or weights that add up to zero where they are normalised.

    References:
        Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML 2024.

    >>> bool(dare_merged(torch.ones(1, 10_000), density=0.1, generator=torch.Generator().manual_seed(0)).mean().round() == 1)
    True
    """
    dropped = sparsified(deltas, density, lambda x, d: (drawn(torch.full_like(x, d), generator), d), rescale)
    return scale * combined(dropped, weights, consensus=consensus, normalise=normalise)
