"""KnOTS: merging in one shared basis of all models' differences (Stoica et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from exapt.algebra.inner import inner_rule
from exapt.algebra.lowrank import LowRank, concatenated, weighed
from exapt.algebra.rule import rule
from exapt.core.components import component
from exapt.core.contract import seeded


@rule("knots", paper="Model merging with SVD to tie the Knots")
def tied(
    deltas: Tensor, weights: Tensor | None = None, generator: torch.Generator | None = None, name: str = "", *,
    inner: str | Callable[..., Tensor] = "ties", settings: Mapping[str, Any] | None = None, side: Literal["left", "right"] = "left",
) -> Tensor:  # fmt: skip
    r"""Another rule, applied to the differences' coordinates in a basis that all of them share: :math:`[\tau_1, \dots, \tau_m] = U S\,[V_1, \dots, V_m]`
    by SVD, :math:`\tau = U f(S V_1, \dots, S V_m)`.

    Differences of adapters need not be aligned entry by entry; in the common basis they are. A rule that is linear gives the same as outside of it.

    Args:
        deltas: Task vectors (m, ...); with more than two dimensions all but the first count as inputs. A vector is merged as it is.
        weights: (m,), given to the rule.
        generator: Given to the rule.
        name: Given to the rule.
        inner: The rule :math:`f`, or its key; the paper takes TIES and DARE-TIES.
        settings: Its configuration.
        side: ``"left"``: the output side's basis is shared, as above; ``"right"``: the input side's.

    Returns:
        (...).

    Raises:
        InputError: for a rule that needs more than the differences.

    The official code (gstoica27/KnOTS) was followed, but for two points: it drops singular values up to 1e-5, here those that are zero to
    the precision of the matrix; it trims over all matrices of the model together, here each matrix is merged by itself.

    References:
        Stoica, Ramesh, Ecsedi, Choshen and Hoffman, "Model merging with SVD to tie the Knots", ICLR 2025.

    >>> deltas = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
    >>> tied(deltas, inner="task_arithmetic").round(decimals=5).abs()
    tensor([[1., 2.],
            [0., 0.]])
    """
    merge = inner_rule(inner, settings, "knots", weights, generator, name)
    if deltas.ndim < 3:
        return merge(deltas)
    flat = deltas.flatten(2).double()
    flat = flat.mT if side == "right" else flat
    u, s, _ = torch.linalg.svd(torch.cat(list(flat), 1), full_matrices=False)
    u = u[:, _supported(s, max(flat.shape), deltas.dtype)]
    if not u.shape[1]:  # nothing changed in any model
        return torch.zeros_like(deltas[0])
    merged = u @ merge((u.mT @ flat).to(deltas.dtype)).double()
    return (merged.mT if side == "right" else merged).reshape(deltas.shape[1:]).to(deltas.dtype)


@component("knots_low_rank", kind="low-rank merge", paper="Model merging with SVD to tie the Knots", oracle="the rule on dense matrices")
def knots_merged(
    terms: Sequence[LowRank], weights: Sequence[float] | None = None, *, inner: str | Callable[..., Tensor] = "ties",
    settings: Mapping[str, Any] | None = None, seed: int = 0, name: str = "",
) -> LowRank:  # fmt: skip
    r"""KnOTS from the factors: the same as the rule ``knots`` of dense matrices, none of which is made.

    With :math:`[B_1, \dots, B_m] = Q\,[R_1, \dots, R_m]` the basis is :math:`Q` times the left singular vectors of
    :math:`[R_1 A_1, \dots, R_m A_m]`, a matrix with as many rows as the ranks' sum.

    Args:
        terms: Task vectors of one shape; their ranks may differ.
        weights: One for each, given to the rule; by default the rule's own.
        inner: The rule, or its key.
        settings: Its configuration.
        seed: Of a rule that draws.
        name: The tensor's.

    Returns:
        Of a rank up to the sum of the terms'; :meth:`~exapt.algebra.lowrank.LowRank.compressed` brings it down.

    Raises:
        InputError: for terms that cannot be added; for a rule that needs more than the differences.

    References:
        Stoica, Ramesh, Ecsedi, Choshen and Hoffman, "Model merging with SVD to tie the Knots", ICLR 2025.
    """
    b = concatenated(terms).B
    w = None if weights is None else torch.tensor(weighed(terms, weights, "knots"), dtype=b.dtype, device=b.device)
    merge = inner_rule(inner, settings, "knots", w, seeded(seed, name), name)
    q, r = torch.linalg.qr(b.double())
    parts = [own @ t.A.double() for own, t in zip(r.split([t.rank for t in terms], 1), terms, strict=True)]
    u, s, _ = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
    u = u[:, _supported(s, max(terms[0].shape), b.dtype)]
    if not u.shape[1]:  # nothing changed in any model
        return 0.0 * terms[0]
    return LowRank((q @ u).to(b.dtype), merge(torch.stack([u.mT @ part for part in parts]).to(b.dtype)))


def _supported(s: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Which singular values are not zero to the precision of a matrix of this size."""
    return s > s.max() * size * torch.finfo(dtype).eps
