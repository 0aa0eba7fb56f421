"""Core space: low-rank models merged in the small space that all of them span (Panariello et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exapt.algebra.inner import inner_rule
from exapt.algebra.lowrank import LowRank, concatenated, weighed
from exapt.algebra.rule import rule
from exapt.core.components import component
from exapt.core.contract import seeded


@rule("core_space", paper="Accurate and Efficient Low-Rank Model Merging in Core Space")
def in_core_space(
    deltas: Tensor, weights: Tensor | None = None, generator: torch.Generator | None = None, name: str = "", *,
    inner: str | Callable[..., Tensor] = "ties", settings: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    r"""Another rule, applied to the cores of low-rank differences (:func:`core_space_merged`), whose factors are found by SVD.

    The space is that of the factors, its basis depends on them: a rule that is not linear gives another result for an adapter's own factors,
    which the paper takes, than for these, :math:`B = U S^{1/2}` and :math:`A = S^{1/2} V^\top` of each difference.

    Args:
        deltas: Task vectors (m, ...); with more than two dimensions all but the first count as inputs. A vector is merged as it is.
        weights: (m,), given to the rule.
        generator: Given to the rule.
        name: Given to the rule.
        inner: The rule, or its key.
        settings: Its configuration.

    Returns:
        (...).

    Raises:
        InputError: for a rule that needs more than the differences.

    References:
        Panariello, Marczak, Magistri, Porrello, Twardowski, Bagdanov, Calderara and van de Weijer, "Accurate and Efficient Low-Rank Model
        Merging in Core Space", NeurIPS 2025.
    """
    merge = inner_rule(inner, settings, "core_space", weights, generator, name)
    if deltas.ndim < 3:
        return merge(deltas)
    terms = []
    for delta in deltas.flatten(2).double():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        keep = s > s.max() * max(delta.shape) * torch.finfo(deltas.dtype).eps
        root = s[keep].sqrt()
        terms.append(LowRank(u[:, keep] * root, root[:, None] * vh[keep]))
    return _on_cores(terms, lambda cores: merge(cores.to(deltas.dtype)).double()).dense().reshape(deltas.shape[1:]).to(deltas.dtype)


@component("core_space_low_rank", kind="low-rank merge", paper="Accurate and Efficient Low-Rank Model Merging in Core Space")
def core_space_merged(
    terms: Sequence[LowRank], weights: Sequence[float] | None = None, *, inner: str | Callable[..., Tensor] = "task_arithmetic",
    settings: Mapping[str, Any] | None = None, seed: int = 0, name: str = "",
) -> LowRank:  # fmt: skip
    r"""Any merge rule on the cores of low-rank task vectors: :math:`\Delta = U f(M_1, \dots, M_m) V^\top` with
    :math:`M_i = U^\top B_i A_i V`.

    :math:`U` holds the left singular vectors of :math:`[B_1, \dots, B_m]`, :math:`V` the right ones of :math:`[A_1; \dots; A_m]`. The cores
    are square, with the sum of the ranks as their size (or smaller, where that is the matrix's), and lose nothing: :math:`U M_i V^\top = B_i A_i`.

    Args:
        terms: Task vectors of one shape; their ranks may differ.
        weights: One for each, given to the rule; by default the rule's own.
        inner: The rule :math:`f`, or its key.
        settings: Its configuration.
        seed: Of a rule that draws.
        name: The tensor's.

    Returns:
        Of a rank up to the sum of the terms'; :meth:`~exapt.algebra.lowrank.LowRank.compressed` brings it down.

    Raises:
        InputError: for terms that cannot be added; for a rule that needs more than the differences.

    The official code (apanariello4/core-space-merging) was followed.

    References:
        Panariello, Marczak, Magistri, Porrello, Twardowski, Bagdanov, Calderara and van de Weijer, "Accurate and Efficient Low-Rank Model
        Merging in Core Space", NeurIPS 2025.

    >>> one, two = LowRank(torch.ones(2, 1), torch.ones(1, 3)), LowRank(torch.eye(2), torch.ones(2, 3))
    >>> core_space_merged([one, two]).dense().round(decimals=4)[0].tolist()
    [2.0, 2.0, 2.0]
    """
    b = concatenated(terms).B
    w = None if weights is None else torch.tensor(weighed(terms, weights, "core_space"), dtype=b.dtype, device=b.device)
    return _on_cores(terms, inner_rule(inner, settings, "core_space", w, seeded(seed, name), name))


def _on_cores(terms: Sequence[LowRank], merge: Callable[[Tensor], Tensor]) -> LowRank:
    stacked = concatenated(terms)
    if not stacked.rank:  # nothing changed in any model
        return stacked
    dtype = stacked.B.dtype
    u = torch.linalg.svd(stacked.B.double(), full_matrices=False)[0]
    vh = torch.linalg.svd(stacked.A.double(), full_matrices=False)[2]
    cores = torch.stack([(u.mT @ t.B.double()) @ (t.A.double() @ vh.mT) for t in terms])
    return LowRank((u @ merge(cores.to(dtype)).double()).to(dtype), vh.to(dtype))
