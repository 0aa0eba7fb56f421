"""DELLA: drop entries at random, the small ones rather than the large (Deep et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sparsify import Consensus, Rescale, combined, drawn, rank_probabilities, shares_of, sparsified
from exapt.algebra.streamed import Mark, Parts, generators, sparse


def _streamed(
    parts: Parts, weights: Tensor | None, generator: torch.Generator, *, density: float | Sequence[float], epsilon: float, scale: float, consensus: Consensus,
    normalise: bool, rescale: Rescale,
) -> Iterator[Tensor]:  # fmt: skip
    shares = shares_of("density", density, len(parts))
    positioned = generators(generator, shares, parts.elements)
    row = parts.elements // parts.shape[0] if len(parts.shape) > 1 else parts.elements

    def begin() -> Mark:
        draws = positioned()

        def mark(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            p = rank_probabilities(x, shares[i], epsilon)
            return drawn(p, draws[i]), p

        return mark

    for dropped in sparse(lambda: parts.rows(row), shares, begin, rescale):
        yield scale * combined(dropped, weights, consensus=consensus, normalise=normalise)


@rule(
    "della", paper="DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", oracle="mergekit", streamed=_streamed
)  # fmt: skip
def della_merged(
    deltas: Tensor, weights: Tensor | None = None, generator: torch.Generator | None = None, *,
    density: float | Sequence[float] = 0.5, epsilon: float = 0.15, scale: float = 1.0, consensus: Consensus = "sum", normalise: bool = True,
    rescale: Rescale = "density",
) -> Tensor:  # fmt: skip
    r"""Keeps each entry with a probability that rises with its rank by size in its row (MagPrune), divides by it, elects signs and averages.

    .. math:: m_i \sim \mathrm{Bernoulli}(p_i), \qquad p_i = d - \epsilon + 2 \epsilon\, \frac{\mathrm{rank}(|\tau_i|)}{n - 1}, \qquad
        \hat\tau_i = m_i \odot \tau_i / p_i

    The half-width :math:`\epsilon` is that of the official code and of mergekit; a vector is one row, and of a convolution a row is all of one output.

    Args:
        deltas: Task vectors (m, ...).
        weights: (m,); by default 1 each.
        generator: Of the masks.
        density: Share of entries to keep, for all or for each model; 1 drops nothing.
        epsilon: How far probabilities go from the density.
        scale: The factor :math:`\lambda`.
        consensus: ``"sum"`` (the paper's) or ``"count"`` elects signs; ``"none"`` does not.
        normalise: Whether to average, or to add (mergekit's ``della_linear`` adds, without signs).
        rescale: ``"density"`` (the paper's: each entry over its own probability), ``"l1"`` (mergekit 0.1.5) or ``"none"``.

    Returns:
        (...).

    Raises:
        InputError: for densities out of [0, 1] or with epsilon out of (0, 1).

    References:
        Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", 2024.

    >>> della_merged(torch.tensor([[1.0, -2.0], [3.0, 2.0]]), density=1.0)
    tensor([2., 2.])
    """

    def mask(x: Tensor, d: float) -> tuple[Tensor, Tensor]:
        p = rank_probabilities(x, d, epsilon)
        return drawn(p, generator), p

    return scale * combined(sparsified(deltas, density, mask, rescale), weights, consensus=consensus, normalise=normalise)
