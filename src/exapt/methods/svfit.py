"""SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values (Sun et al., 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class SVFit(WeightMethod):
    r"""Trains the largest singular values: :math:`W' = W + U_r\, \mathrm{diag}(s - s_0)\, V_r^\top`.

    :math:`W = U\, \mathrm{diag}(s_0)\, V^\top` is the singular value decomposition. The paper writes the same as
    :math:`U_r\, \mathrm{diag}(s)\, V_r^\top` plus the frozen rest of :math:`W`; here the base keeps its weight.

    Args:
        rank: Number :math:`r` of singular values that train; where a matrix has fewer, all of them. The paper takes as
            many as hold 99% of the matrix, up to all.

    Parameters per site:
        ``s`` (rank,), which trains from ``s0``; ``U`` (d_out, rank) and ``Vh`` (rank, d_in), frozen. The frozen ones are
        stored: a decomposition may come out differently on another machine.

    References:
        Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), SVFit(rank=2), where="all")
    >>> exapt.parameter_count(model).trainable
    2
    """

    key = "svfit"
    paper = "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values"
    equation = r"W' = W + U_r\, \mathrm{diag}(s - s_0)\, V_r^\top"
    golden = "NumPy"
    reads_weight = True
    full_precision = True

    rank: int = 256

    def check(self, site: Site) -> None:
        if self.rank < 1:
            raise InputError(f"{site.name or '(model)'}: svfit.rank is {self.rank}; it must be at least 1")

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, min(self.rank, *site.shape)
        check_finite(self, site, w)
        u, s, vh = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
        s = s[:r].clone()
        return {"s": s, "s0": frozen(s.clone()), "U": frozen(u[:, :r].contiguous()), "Vh": frozen(vh[:r].contiguous())}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["U"] * (p["s"] - p["s0"]), p["Vh"])

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, p["Vh"], p["U"] * (p["s"] - p["s0"]))
