"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
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
        start: ``"kaiming"``: ``A`` uniform, bounded by :math:`1 / \sqrt{d_{in}}`; ``"gaussian"``: ``A`` normal with deviation
            :math:`1 / r`; ``"orthogonal"``: neither factor is zero but their product is, ``B`` living in one half of an
            orthonormal basis of the rank and ``A`` in the other (even ranks).
        plus: Factor on the learning rate of ``B`` (LoRA+, Hayou et al. 2024, who suggest 16).

    Parameters per site:
        ``A`` (rank, d_in), random; ``B`` (d_out, rank), zeros unless ``start`` says otherwise.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
        Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), LoRA(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 4), (3, 2)]
    """

    key = "lora"
    paper = "LoRA: Low-Rank Adaptation of Large Language Models"
    equation = r"W' = W + \frac{\alpha}{r} B A"
    golden = "PEFT"
    variants: ClassVar = {
        "PERL: Parameter Efficient Reinforcement Learning from Human Feedback": (
            "reward model and policy are LoRAs of one base, which is the reference too: exapt.disabled(model)"
        ),
        "PVP: Pre-trained Visual Parameter-Efficient Tuning": "LoRA (or VPT) trained upstream, then start_from(model, file) downstream, with a new head",
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA": "LoRA(scaling='rs')",
        "LoRA+: Efficient Low Rank Adaptation of Large Models": "LoRA(plus=16.0)",
    }
    full_precision = True  # the low-rank product casts inside, so that no cast factor is kept for backward

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: Literal["standard", "rs"] = "standard"
    start: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    plus: float = 1.0

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / (self.rank**0.5 if self.scaling == "rs" else self.rank)

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if self.start == "orthogonal" and self.rank % 2:
            raise InputError(f"lora.rank is {self.rank}; start='orthogonal' halves it, so choose an even rank or another start")

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), r = site.shape, self.rank
        a = torch.empty(r, d_in, device=site.device)
        if self.start == "orthogonal":
            q, _ = torch.linalg.qr(a.new_empty(r, r).normal_())
            b = a.new_empty(d_out, r // 2).normal_(0, 0.1) @ q[1::2]
            return {"A": (q[::2].T @ a.new_empty(r // 2, d_in).normal_(0, 0.1)), "B": b}
        if self.start == "gaussian":
            a.normal_(0, 1 / r)
        else:
            a.uniform_(-(d_in**-0.5), d_in**-0.5)  # Kaiming uniform, slope sqrt(5)
        return {"A": a, "B": a.new_zeros(d_out, r)}

    def rates(self) -> Mapping[str, float]:
        return {} if self.plus == 1 else {"B": self.plus}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return torch.addmm(w, p["B"].to(w.dtype), p["A"].to(w.dtype), alpha=self.factor)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        dropped = F.dropout(x, self.dropout, base.training) if self.dropout and x.is_floating_point() else None
        return base.low_rank(x, p["A"], p["B"], self.factor, dropped)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["A"], self.factor * p["B"]

    def needs_forward(self) -> bool:
        return self.dropout > 0
