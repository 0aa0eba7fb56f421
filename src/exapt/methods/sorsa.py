"""SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation (Cao, 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite, check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class SORSA(WeightMethod):
    r"""Trains the principal singular values and vectors, and keeps the vectors near orthonormal:
    :math:`W' = (W - U_0 S_0 V_0^\top) + U S V^\top`.

    :math:`U_0 S_0 V_0^\top` is the singular value decomposition of :math:`W` cut after :math:`r` values. The loss gets
    :math:`\gamma\,(\lVert U^\top U - I \rVert_F + \lVert V^\top V - I \rVert_F)` per site. The base keeps its weight: the change is
    computed as a product of rank :math:`2r` that is exactly zero at the start.

    Args:
        rank: Rank :math:`r`.
        gamma: Weight :math:`\gamma` of the regulariser at each site. The official code sets it by the learning rate and the
            number :math:`n` of sites: its gamma (4e-4) over :math:`2 n` times the learning rate; the default is about that
            for a learning rate of 3e-5 and 200 sites.

    Parameters per site:
        ``U`` (d_out, rank), ``S`` (rank,), ``V`` (rank, d_in), which train from ``U0``, ``S0`` and ``V0``, frozen and stored
        with them: a decomposition may come out differently on another machine.

    References:
        Cao, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), SORSA(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(3, 2), (2,), (2, 4)]
    """

    key = "sorsa"
    paper = "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models"
    equation = r"W' = W - U_0 S_0 V_0^\top + U S V^\top"
    golden = "NumPy"
    reads_weight = True
    full_precision = True

    rank: int = 4
    gamma: float = 0.03

    def check(self, site: Site) -> None:
        check_rank(self, site)

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, self.rank
        check_finite(self, site, w)
        u, s, vh = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
        start = {"U": u[:, :r].contiguous(), "S": s[:r].contiguous(), "V": vh[:r].contiguous()}
        return {**start, **{f"{k}0": frozen(t.clone()) for k, t in start.items()}}

    def penalty(self, p: Tensors, w: Tensor) -> Tensor:
        one = torch.eye(self.rank, dtype=p["U"].dtype, device=p["U"].device)
        u, v = p["U"].mT @ p["U"] - one, p["V"] @ p["V"].mT - one
        return self.gamma * (torch.linalg.matrix_norm(u) + torch.linalg.matrix_norm(v)).sum()

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = _product(p)
        return plus_product(w, b, a)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return _product(p)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *_product(p))


def _product(p: Tensors) -> tuple[Tensor, Tensor]:
    """The change as one product of rank ``2 r``."""
    b, b0 = p["U"] * p["S"], p["U0"] * p["S0"]
    return torch.cat([p["V"], p["V"] - p["V0"]]), torch.cat([b - b0, b0], 1)
