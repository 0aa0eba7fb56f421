"""QA-LoRA: Quantization-Aware Low-Rank Adaptation (Xu et al., ICLR 2024)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_divides, check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class QALoRA(WeightMethod):
    r"""LoRA on inputs summed over groups: :math:`y = W x + s\, B A\, P x`, where :math:`P` sums each group of :math:`g` inputs.

    The update is constant within a group of columns, :math:`\Delta W = s\, B A P`. Where :math:`W` is quantised with one scale
    and zero point a row and group of :math:`g` columns, it merges by a change of the zero points alone: the integers stay.

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update; :math:`s = \alpha / r`.
        group_size: Number :math:`g` of neighbouring inputs in a group, the quantisation's; it divides d_in.
        pool: What :math:`P` gives for a group: ``"sum"`` (the paper's), ``"mean"`` (the authors' code), or ``"scaled_mean"``: the
            mean times the number of groups (PEFT's).

    Parameters per site:
        ``A`` (rank, d_in / group_size), Kaiming uniform; ``B`` (d_out, rank), zeros.

    References:
        Xu et al., "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", ICLR 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(8, 3), QALoRA(rank=2, group_size=4), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 2), (3, 2)]
    """

    key = "qalora"
    paper = "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models"
    equation = r"W' = W + \frac{\alpha}{r} B A P"
    golden = "PEFT"

    rank: int = 8
    alpha: float = 16.0
    group_size: int = 16
    pool: Literal["sum", "mean", "scaled_mean"] = "sum"

    def factor(self, d_in: int) -> float:
        """The scale of the sums."""
        size = self.group_size
        return self.alpha / self.rank * {"sum": 1.0, "mean": 1 / size, "scaled_mean": d_in / size**2}[self.pool]

    def check(self, site: Site) -> None:
        check_rank(self, site)
        check_divides(self, site, "group_size", site.shape[1], "inputs")

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        groups = d_in // self.group_size
        a = torch.empty(self.rank, groups, device=site.device).uniform_(-(groups**-0.5), groups**-0.5)
        return {"A": a, "B": a.new_zeros(d_out, self.rank)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return w + self.factor(w.shape[1]) * (p["B"] @ p["A"]).repeat_interleave(self.group_size, 1)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["A"].repeat_interleave(self.group_size, 1), self.factor(shape[1]) * p["B"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        factor = self.factor(base.shape[1])
        if base.kind not in ("linear", "conv1d_hf"):
            return base.low_rank(x, p["A"].repeat_interleave(self.group_size, 1), p["B"], factor)
        sums = x.unflatten(-1, (-1, self.group_size)).sum(-1)  # all that backward keeps of x
        return torch.add(base(x), F.linear(F.linear(sums, p["A"]), p["B"]), alpha=factor)
