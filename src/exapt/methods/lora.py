"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class LoRA(WeightMethod):
    r"""Adds a rank-:math:`r` update: :math:`W' = W + s B A` with :math:`s = \alpha / r`.

    Args:
        rank: Rank :math:`r` of the update. Ranks per site: ``attach(model, {where: LoRA(4), other: LoRA(16)})``.
        alpha: Scale of the update.
        dropout: Probability of dropping an input feature of the update in training.
        scaling: ``"standard"``: :math:`\alpha / r`; ``"rs"``: :math:`\alpha / \sqrt r` (rsLoRA, Kalajdzievski 2023), which
            keeps the size of the update's gradient independent of the rank.

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``B`` (d_out, rank), zeros.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), LoRA(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 4), (3, 2)]
    """

    key = "lora"
    paper = "LoRA: Low-Rank Adaptation of Large Language Models"
    full_precision = True  # the low-rank product casts inside, so that no cast factor is kept for backward

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: Literal["standard", "rs"] = "standard"

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / (self.rank**0.5 if self.scaling == "rs" else self.rank)

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        a = torch.empty(self.rank, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)  # Kaiming uniform, slope sqrt(5)
        return {"A": a, "B": a.new_zeros(d_out, self.rank)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return torch.addmm(w, p["B"].to(w.dtype), p["A"].to(w.dtype), alpha=self.factor)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        dropped = F.dropout(x, self.dropout, base.training) if self.dropout and x.is_floating_point() else None
        return base.low_rank(x, p["A"], p["B"], self.factor, dropped)

    def needs_forward(self) -> bool:
        return self.dropout > 0
