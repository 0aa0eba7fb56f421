"""PEGO: Parameter-Efficient Group with Orthogonal regularization (Hu et al., ECCV 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class PEGO(WeightMethod):
    r"""Adds a group of :math:`N` low-rank updates, kept orthogonal to the weight and to each other: :math:`W' = W + \sum_i B_i A_i`.

    The loss gets :math:`\lambda \big(\sum_i \| W (B_i A_i)^\top \|_1 + \sum_{i<j} \| B_i A_i (B_j A_j)^\top \|_1\big)`: rows of an update are
    to be orthogonal to the weight's rows, which preserves what it knows, and to the other updates' rows, which makes them differ.
    The 1-norm, the sum of absolute values, and the side of the products are the official code's. By default the group sits at queries
    and values, as in the paper.

    Args:
        number: Number :math:`N` of updates.
        rank: Rank of each.
        penalty_weight: The factor :math:`\lambda`; the official code's 0.1.

    Parameters per site:
        ``A`` (number, rank, d_in), Kaiming uniform; ``B`` (number, d_out, rank), zeros.

    References:
        Hu, Zhang, Qi, Shi and Gao, "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain
        Generalization", ECCV 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), PEGO(number=2, rank=1), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 1, 4), (2, 3, 1)]
    """

    key = "pego"
    paper = "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain Generalization"
    equation = r"W' = W + \sum_{i=1}^N B_i A_i"
    golden = "NumPy"
    where = ("attention.query", "attention.value")
    full_precision = True

    number: int = 4
    rank: int = 4
    penalty_weight: float = 0.1

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if self.number < 1:
            raise InputError(f"pego.number is {self.number}; a group has at least 1 update")

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), n, r = site.shape, self.number, self.rank
        a = torch.empty(n, r, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        return {"A": a, "B": a.new_zeros(n, d_out, r)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return (w + (p["B"] @ p["A"]).sum(0)).to(w.dtype)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["A"].flatten(0, 1), p["B"].transpose(0, 1).flatten(1)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, p["A"].flatten(0, 1), p["B"].transpose(0, 1).flatten(1))

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        if not self.penalty_weight:
            return None
        a, b = p["A"].unbind(-3), p["B"].unbind(-3)
        w = w.to(a[0].dtype)
        terms = [((w @ a_i.mT) @ b_i.mT).abs().sum() for a_i, b_i in zip(a, b, strict=True)]
        terms += [(b[i] @ (a[i] @ a[j].mT) @ b[j].mT).abs().sum() for i in range(len(a)) for j in range(i + 1, len(a))]
        return self.penalty_weight * torch.stack(terms).sum()
