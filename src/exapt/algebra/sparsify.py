"""The pieces that rules on task vectors share: sparsify, rescale, elect signs, combine. Each is a plain function of tensors.

A rule such as TIES or DARE is a choice of one of each: :func:`sparsified` with a mask of its own, then :func:`combined`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from exapt.core.errors import InputError, did_you_mean

Consensus = Literal["none", "sum", "count"]
"""How the sign of each entry is elected: not at all, by the sum of all values there, or by the number of models."""
Rescale = Literal["none", "density", "l1"]
"""What makes up for the entries dropped: nothing, a division by the probability of being kept, or a factor that restores the sum of sizes."""
Masked = Callable[[Tensor, float], tuple[Tensor, Tensor | float]]
"""From a task vector and a density: which entries are kept, and with what probability each."""


def smallest(x: Tensor, count: int) -> Tensor:
    """Marks the ``count`` entries that are smallest in size; of equal ones those that come first.

    Args:
        x: Any shape.
        count: How many; less than one marks none, more than there are marks all.

    Returns:
        Boolean, shaped as ``x``. What a smaller count marks, a larger one marks too.

    >>> smallest(torch.tensor([3.0, -1.0, 1.0, 2.0]), 2)
    tensor([False,  True,  True, False])
    """
    if count <= 0 or count >= x.numel():
        return torch.full_like(x, count > 0, dtype=torch.bool)
    sizes = x.abs().flatten()
    threshold = sizes.kthvalue(count).values
    marked = sizes < threshold
    equal = (sizes == threshold).nonzero()[:, 0]
    marked[equal[: count - int(marked.sum())]] = True
    return marked.reshape(x.shape)


def largest(x: Tensor, density: float) -> Tensor:
    r"""Marks the share :math:`d` of entries that is largest in size: :math:`\lfloor d\,n \rfloor` of :math:`n`, at least one where :math:`d > 0`.

    >>> largest(torch.tensor([3.0, -1.0, 1.0, -2.0]), 0.5)
    tensor([ True, False, False,  True])
    """
    return ~smallest(x, x.numel() - max(int(density * x.numel()), int(density > 0)))


def without_outliers(x: Tensor, density: float, gamma: float) -> Tensor:
    r"""Marks the share :math:`d` of entries that remains after the share :math:`\gamma` largest in size and then the smallest are left out.

    Where :math:`d + \gamma > 1` fewer of the largest are left out, so that the share holds.

    >>> without_outliers(torch.tensor([4.0, -1.0, 2.0, -3.0]), 0.5, 0.25)
    tensor([False, False,  True,  True])
    """
    low, high = band(x.numel(), density, gamma)
    return smallest(x, high) & ~smallest(x, low)


def band(count: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of ``count`` entries, by size, lie below those that :func:`without_outliers` marks, and how many up to the largest marked.

    >>> band(4, 0.5, 0.25)
    (1, 3)
    """
    kept = int(density * count)
    low = max(0, count - kept - int(gamma * count))
    return low, low + kept


def rank_probabilities(x: Tensor, density: float, epsilon: float) -> Tensor:
    r"""Probabilities that rise with an entry's rank by size in its row, from :math:`d - \epsilon` to :math:`d + \epsilon` (MagPrune).

    Args:
        x: (d_out, ...): a row is everything of one output; a vector is one row.
        density: The mean probability :math:`d`.
        epsilon: Half the range :math:`\epsilon`.

    Returns:
        Shaped as ``x``.

    Raises:
        InputError: where the range leaves (0, 1).

    >>> rank_probabilities(torch.tensor([[3.0, -1.0, 2.0]]), 0.5, 0.25)
    tensor([[0.7500, 0.2500, 0.5000]])
    """
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise InputError(f"epsilon={epsilon}: density {density} -/+ epsilon must lie between 0 and 1, and epsilon be no less than 0")
    rows = x.reshape(len(x) if x.ndim > 1 else 1, -1) if x.numel() else x.reshape(1, 0)
    order = rows.abs().argsort(dim=1, stable=True)
    ranks = torch.empty_like(rows).scatter_(1, order, torch.arange(rows.shape[1], dtype=x.dtype, device=x.device).expand_as(rows))
    last = rows.shape[1] - 1
    share = ranks / last if last > 0 else torch.full_like(ranks, 0.5)
    return ((density - epsilon) + share * (2 * epsilon)).reshape(x.shape)


def drawn(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Marks entries at random, each with its own probability; drawn on the CPU, so that a seed means the same everywhere.

    >>> drawn(torch.tensor([0.0, 1.0]))
    tensor([False,  True])
    """
    p = probabilities.float().cpu()
    return (torch.rand(p.shape, generator=generator) < p).to(probabilities.device)  # what torch.bernoulli draws, in a fifth of the time


def kept(x: Tensor, mask: Tensor, rescale: Rescale = "none", probability: Tensor | float = 1.0) -> Tensor:
    r"""Sets entries that are not marked to zero, and makes up for them.

    Args:
        x: A task vector.
        mask: Boolean, shaped as ``x``.
        rescale: ``"none"``; ``"density"``: entries over the probability with which they are kept, which leaves the expectation as it was;
            ``"l1"``: times :math:`\lVert x \rVert_1 / \lVert m \odot x \rVert_1`.
        probability: With what probability entries are kept.

    Returns:
        Shaped as ``x``.

    >>> kept(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, True]), "l1")
    tensor([0.0000, 2.4000, 3.6000])
    """
    check_choice("rescale", rescale, Rescale)
    masked = x * mask  # in a quarter of the time that torch.where takes
    if rescale == "density":
        least = torch.finfo(x.dtype).tiny  # a probability of zero divides nothing that is kept
        return masked / (probability.clamp(min=least) if isinstance(probability, Tensor) else max(probability, least))
    if rescale == "l1":
        before, after = x.abs().sum(), masked.abs().sum()
        return masked * torch.where(after > 0, before / after, 1.0)
    return masked


def sparsified(deltas: Tensor, density: float | Sequence[float], mask: Masked, rescale: Rescale = "none") -> Tensor:
    """Sparsifies every task vector; one whose density is 1 stays as it is.

    Args:
        deltas: (m, ...).
        density: Share of entries to keep; one for all, or one for each.
        mask: Which are kept.
        rescale: See :func:`kept`.

    Returns:
        Shaped as ``deltas``.

    Raises:
        InputError: for densities out of [0, 1], or another number of them than task vectors.

    >>> sparsified(torch.tensor([[1.0, -2.0], [4.0, 3.0]]), [0.5, 1.0], lambda x, d: (largest(x, d), d))
    tensor([[ 0., -2.],
            [ 4.,  3.]])
    """
    check_choice("rescale", rescale, Rescale)
    shares = shares_of("density", density, len(deltas))
    done = []
    for x, share in zip(deltas, shares, strict=True):
        if 0 < share < 1:
            marked, probability = mask(x, share)
            x = kept(x, marked, rescale, probability)
        done.append(x if share else torch.zeros_like(x))
    return torch.stack(done)


def agreeing(values: Tensor, consensus: Consensus = "sum") -> Tensor:
    r"""Marks the values whose sign is the elected one of their entry; zeros never are.

    Args:
        values: Weighted task vectors (m, ...).
        consensus: ``"sum"``: the sign of the sum (TIES); ``"count"``: that of most models. A tie elects plus.

    Returns:
        Boolean (m, ...).

    >>> agreeing(torch.tensor([[3.0, 1.0], [-1.0, 0.0], [-1.0, 1.0]]))
    tensor([[ True,  True],
            [False, False],
            [False,  True]])
    """
    return values * elected(values, consensus) > 0


def elected(values: Tensor, consensus: Consensus = "sum") -> Tensor:
    """The elected sign of every entry (...), 1 or -1: see :func:`agreeing`."""
    votes = (values if consensus == "sum" else values.sign()).sum(0)
    return (votes >= 0).to(values) * 2 - 1


def combined(deltas: Tensor, weights: Tensor | None = None, *, consensus: Consensus = "none", normalise: bool = False) -> Tensor:
    r"""Weighted sum of task vectors, of those alone that agree on the sign where one is elected; by the sum of their weights, if normalised.

    .. math:: \tau = \sum_i w_i m_i \odot \tau_i \;\Big/\; \sum_i w_i m_i

    Args:
        deltas: (m, ...).
        weights: (m,); by default 1 each.
        consensus: See :func:`agreeing`; ``"none"`` keeps all.
        normalise: Whether to divide. An entry where the weights add up to zero is not divided.

    Returns:
        (...).

    Raises:
        InputError: for weights that add up to zero where they are normalised.

    >>> combined(torch.tensor([[3.0, 1.0], [-1.0, 2.0]]), consensus="sum", normalise=True)
    tensor([3.0000, 1.5000])
    """
    check_choice("consensus", consensus, Consensus)
    w = deltas.new_ones(len(deltas)) if weights is None else weights.to(deltas)
    if consensus == "none":
        total = w.sum()
        if normalise and float(total.abs()) < 1e-8:
            raise InputError(f"the weights {w.tolist()} add up to zero, and cannot be normalised; pass normalise=False or others")
        return torch.tensordot(w, deltas, 1) / (total if normalise else 1)
    values = deltas if weights is None else deltas * w.reshape(-1, *[1] * (deltas.ndim - 1))
    sign = elected(values, consensus)
    agreed = values * sign
    tau = sign * agreed.relu().sum(0)
    if not normalise:
        return tau
    share = torch.tensordot(w, (agreed > 0).to(w), 1)
    return tau / torch.where(share.abs() < 1e-8, 1.0, share)


def shares_of(what: str, value: float | Sequence[float], count: int) -> list[float]:
    """One share for each of ``count`` models, from one for all or one for each.

    Raises:
        InputError: for another number of them, or one out of [0, 1].

    >>> shares_of("density", 0.5, 2)
    [0.5, 0.5]
    """
    shares = [float(value)] * count if isinstance(value, int | float) else [float(v) for v in value]
    if len(shares) != count or not all(0 <= s <= 1 for s in shares):
        raise InputError(f"{what}={value}: give one number from 0 to 1, or one for each of the {count} models")
    return shares


def check_choice(what: str, value: str, choices: object) -> None:
    """Refuses a value that is none of a ``Literal``'s.

    Raises:
        InputError: for such a value.
    """
    known = list(get_args(choices))
    if value not in known:
        raise InputError(f'{what}="{value}"{did_you_mean(value, known)}; give one of {", ".join(known)}')
