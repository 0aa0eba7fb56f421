"""Orthogonal Adaptation: LoRA made to be summed (Po et al., CVPR 2024)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class OrthogonalAdaptation(WeightMethod):
    r"""LoRA whose input factor is frozen, and drawn so that the adapters of different concepts hardly meet:
    :math:`W' = W + s A B^\top`, :math:`B_i^\top B_j \approx 0`.

    An adapter then changes nothing for inputs in another one's subspace, and adapters trained by people who do not know of each other can
    be merged by their sum (the paper's factor on the sum is 0.6).

    Args:
        rank: Rank :math:`r` of the update.
        concept: Which adapter of the family this is, from 0; give each one its own.
        columns: How :math:`B` is made. ``"random"``: :math:`r` columns of an orthogonal basis that the family shares, drawn anew for each
            concept (the paper's choice; two concepts may share a column). ``"disjoint"``: the basis' columns in turn, so that
            :math:`B_i^\top B_j = 0` exactly, for at most d_in / r concepts. ``"gaussian"``: no basis, entries of deviation
            :math:`d_{in}^{-1/2}` (the paper's alternative, with more crosstalk).
        scale: The factor :math:`s`; the paper has none.
        seed: Of the family's basis.

    Parameters per site:
        ``A`` (d_out, rank), zeros. Frozen: ``B`` (d_in, rank).

    No official code is public; the paper was followed. It leaves open which basis: here it is that of the cosine transform with a random sign
    for each input, whose columns can be made one by one. It says nothing of the Gaussian's deviation.

    References:
        Po, Yang, Aberman and Wetzstein, "Orthogonal Adaptation for Modular Customization of Diffusion Models", CVPR 2024.

    >>> import exapt
    >>> from torch import nn
    >>> one, two = (OrthogonalAdaptation(rank=2, concept=i, columns="disjoint") for i in (0, 1))
    >>> B = [exapt.attach(nn.Linear(4, 3), m, where="all").state_dict() for m in (one, two)]
    >>> B = [next(t for k, t in b.items() if k.endswith("B")) for b in B]
    >>> (B[0].T @ B[1]).abs().max().item() < 1e-6
    True
    """

    key = "orthogonal_adaptation"
    paper = "Orthogonal Adaptation for Modular Customization of Diffusion Models"
    equation = r"W' = W + s A B^\top, \quad B_i^\top B_j \approx 0"
    golden = "NumPy"
    full_precision = True

    rank: int = 8
    concept: int = 0
    columns: Literal["random", "disjoint", "gaussian"] = "random"
    scale: float = 1.0
    seed: int = 0

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if self.concept < 0:
            raise InputError(f"orthogonal_adaptation.concept is {self.concept}; number the concepts from 0")
        most = site.shape[1] // self.rank
        if self.columns == "disjoint" and self.concept >= most:
            raise InputError(
                f"{site.name or '(model)'}: orthogonal_adaptation.concept is {self.concept}; the {site.shape[1]} inputs hold {most} disjoint concepts of rank "
                f"{self.rank}, so lower rank or take columns='random'"
            )

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        return {"A": torch.zeros(d_out, self.rank), "B": frozen(self._columns(d_in, site.name))}

    def _columns(self, d_in: int, name: str) -> Tensor:
        own = seeded(self.seed, "orthogonal_adaptation", name, str(self.concept))
        if self.columns == "gaussian":
            return torch.randn(d_in, self.rank, generator=own) * d_in**-0.5
        if self.columns == "random":
            index = torch.randperm(d_in, generator=own)[: self.rank]
        else:
            index = torch.arange(self.concept * self.rank, (self.concept + 1) * self.rank)
        return _basis(self.seed, d_in, index).float()

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["A"], p["B"].T, self.scale)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["B"].T, self.scale * p["A"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        y = base(x)  # base.low_rank would keep x for backward
        return base.added(y, base.apply(p["B"].T.to(y.dtype), x), p["A"], self.scale)


def _basis(seed: int, size: int, index: Tensor) -> Tensor:
    """Columns (size, k) of the family's orthogonal basis, in double precision: cosines, each row with a random sign."""
    signs = 2 * torch.randint(2, (size, 1), generator=seeded(seed, "orthogonal_adaptation", str(size))) - 1
    turns = (2 * torch.arange(size)[:, None] + 1) * index % (4 * size)  # whole numbers: exact for any size
    return signs * (turns.double() * (math.pi / (2 * size))).cos() * torch.where(index == 0, 1.0, 2.0).double().div(size).sqrt()
