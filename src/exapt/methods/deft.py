"""DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models (Kumar et al., NeurIPS 2025)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class DEFT(WeightMethod):
    r"""Removes a subspace from the outputs and puts a low-rank update into it: :math:`W' = (I - Q V^\top) W + s\, Q R`.

    "relu": :math:`Q = P`, :math:`V = \mathrm{relu}(P)`; "qr": :math:`Q = V`, the orthonormal factor of :math:`P`, so that
    :math:`Q V^\top` is a projection.

    Args:
        rank: Columns :math:`r` of :math:`P`; d_out at most.
        decomposition: How :math:`Q` and :math:`V` come from :math:`P`.
        alpha: Scale of the update, :math:`s = \alpha / r`; ``None``: :math:`s = 1`.
        para: PaRa (Chen et al., 2025): removal only, :math:`W' = (I - Q V^\top) W`. It does not start at the base model.
        start: ``"identity"``: :math:`R = V^\top W / s`, which starts at the base model, PEFT's default; ``"random"``: as in the paper.
        dropout: Probability of dropping an input feature of the update :math:`R` in training.

    Parameters per site:
        ``P`` (d_out, rank), normal with deviation 0.02; ``R`` (rank, d_in), not with ``para``.

    References:
        Kumar, Anwer, Khan, Khan, Laptev and Cholakkal, "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models",
        NeurIPS 2025.
        Chen, Pan, Cai and Phung, "PaRa: Personalizing Text-to-Image Diffusion via Parameter Rank Reduction", ICLR 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(6, 4), DEFT(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(4, 2), (2, 6)]
    """

    key = "deft"
    paper = "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models"
    equation = r"W' = (I - Q V^\top)\, W + s\, Q R"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    rank: int = 8
    decomposition: Literal["relu", "qr"] = "relu"
    alpha: float | None = None
    para: bool = False
    start: Literal["identity", "random"] = "identity"
    dropout: float = 0.0

    def check(self, site: Site) -> None:
        if self.rank < 1:
            raise InputError(f"{site.name or '(model)'}: deft.rank is {self.rank}; it must be at least 1")

    def factor(self, d_out: int) -> float:
        """The scale :math:`s`."""
        return self.alpha / min(self.rank, d_out) if self.alpha else 1.0

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        w = site.weight
        wide = torch.promote_types(w.dtype, torch.float32)
        p = 0.02 * torch.randn(d_out, min(self.rank, d_out), device=site.device, dtype=wide)
        if self.para:
            return {"P": p}
        if self.start == "random":
            return {"P": p, "R": 0.02 * torch.randn(p.shape[1], d_in, device=site.device, dtype=wide)}
        return {"P": p, "R": self._sides(p)[1].T @ w.to(wide) / self.factor(d_out)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        q, v = self._sides(p["P"])
        removed = v.T @ w.to(q.dtype)
        new = -removed if self.para else self.factor(w.shape[0]) * p["R"] - removed
        return plus_product(w, q, new)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        q, v = (t.to(y.dtype) for t in self._sides(p["P"]))
        pure = y if base.bias is None else y - base.scale(base.bias.to(y.dtype), y.new_ones(()))
        change = -base.out(v.T, pure)
        if not self.para:
            inner = F.dropout(x, self.dropout, base.training) if self.dropout and x.is_floating_point() else x
            change = change + self.factor(q.shape[0]) * base.apply(p["R"].to(y.dtype), inner)
        return base.added(y, change, q)

    def needs_forward(self) -> bool:
        return self.dropout > 0

    def _sides(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """``Q`` and ``V``."""
        if self.decomposition == "relu":
            return p, p.relu()
        q = torch.linalg.qr(p.float() if p.dtype.itemsize < 4 else p)[0]
        return q, q
