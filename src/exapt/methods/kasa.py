"""KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models (Wang et al., ICLR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

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
class KaSA(WeightMethod):
    r"""Drops the :math:`r` smallest singular components of :math:`W` and learns an update in the form of a decomposition:
    :math:`W' = W - U_- S_- V_-^\top + s\, B\, \mathrm{diag}(d)\, A` with :math:`s = \alpha / r`.

    The dropped part is subtracted in the product; the base keeps its weight. Per site the loss gets
    :math:`\beta \lVert d \rVert^2 + \gamma\,(\lVert B^\top B - I \rVert_F + \lVert A A^\top - I \rVert_F)`, which is the paper's and PEFT's
    form; the official code for GLUE compares :math:`A^\top A` and :math:`B B^\top` (which cannot be the identity) and divides by the
    number of sites. It also keeps d_in - r components where this drops :math:`r` of all there are, as PEFT does.

    Args:
        rank: Rank :math:`r`, below the number of singular values.
        alpha: Scale of the update.
        beta: Weight of the penalty on the singular values.
        gamma: Weight of the penalty on the factors.

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``B`` (d_out, rank), zeros; ``d`` (rank,), normal. Frozen and stored, the dropped
        part: ``A_`` (rank, d_in) and ``B_`` (d_out, rank), which holds the singular values.

    References:
        Wang, Jiang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", ICLR 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), KaSA(rank=2), where="all")
    >>> {n.rpartition(".")[2]: tuple(p.shape) for n, p in exapt.trainable(model).items()}
    {'A': (2, 4), 'B': (3, 2), 'd': (2,)}
    """

    key = "kasa"
    paper = "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models"
    equation = r"W' = W - U_- S_- V_-^\top + \frac{\alpha}{r} B\, \mathrm{diag}(d)\, A"
    golden = "PEFT"
    reads_weight = True
    full_precision = True
    exceptions: ClassVar = {"identity": "the smallest singular components of the weight are dropped at the start"}

    rank: int = 8
    alpha: float = 16.0
    beta: float = 1e-4
    gamma: float = 1e-3

    def check(self, site: Site) -> None:
        check_rank(self, site, most=min(site.shape) - 1)

    def init(self, site: Site) -> Tensors:
        w, (d_out, d_in), r = site.weight, site.shape, self.rank
        check_finite(self, site, w)
        u, s, vh = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
        a = torch.empty(r, d_in, device=w.device).uniform_(-(d_in**-0.5), d_in**-0.5)  # Kaiming uniform, slope sqrt(5)
        dropped = {"A_": frozen(vh[-r:].contiguous()), "B_": frozen(u[:, -r:] * s[-r:])}
        return {"A": a, "B": a.new_zeros(d_out, r), "d": torch.randn(r, device=w.device), **dropped}

    def penalty(self, p: Tensors, w: Tensor) -> Tensor:
        one = torch.eye(self.rank, dtype=p["A"].dtype, device=p["A"].device)
        b, a = p["B"].mT @ p["B"] - one, p["A"] @ p["A"].mT - one
        return self.beta * p["d"].square().sum() + self.gamma * (torch.linalg.matrix_norm(b) + torch.linalg.matrix_norm(a)).sum()

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self.low_rank(p, (w.shape[0], w.shape[1]))
        return plus_product(w, b, a)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return torch.cat([p["A"], p["A_"]]), torch.cat([self.alpha / self.rank * p["B"] * p["d"], -p["B_"]], 1)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        b = torch.cat([self.alpha / self.rank * p["B"] * p["d"], -p["B_"]], 1)
        return base.low_rank(x, torch.cat([p["A"], p["A_"]]), b)
