"""LoRA-FA: LoRA with one factor frozen as it was drawn (Zhang et al., 2023)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class LoRAFA(WeightMethod):
    r"""LoRA of which one factor is random and frozen: :math:`W' = W + s B A`, with :math:`A` drawn and :math:`B` trained.

    Training ``B`` alone, backward needs of the layer's input only :math:`A x`, which has :math:`r` features.

    Args:
        rank: Rank :math:`r` of the update.
        alpha: Scale of the update.
        scaling: ``"standard"``: :math:`s = \alpha / r`; ``"rs"``: :math:`s = \alpha / \sqrt r`.
        train: ``"B"``, or ``"A"`` for the converse (:math:`B` drawn and frozen), the comparison of the asymmetry paper.
        start: The frozen factor: ``"kaiming"`` uniform, bounded by one over the root of its columns; ``"orthonormal"`` rows of ``A``
            (columns of ``B``), as in the asymmetry paper.
        seed: Seed of the frozen factor.

    Parameters per site:
        ``A`` (rank, d_in) and ``B`` (d_out, rank); the trained one starts at zero. The frozen one is made again from the seed when a
        file is loaded; an orthonormal one is stored, since a decomposition may come out differently on another machine.

    References:
        Zhang, Zhang, Shi, Chu, Li, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023.
        Zhu et al., "Asymmetry in Low-Rank Adapters of Foundation Models", ICML 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), LoRAFA(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(3, 2)]
    """

    key = "lora_fa"
    paper = "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning"
    equation = r"W' = W + s B A_0"
    golden = "PEFT"
    variants: ClassVar = {"Asymmetry in Low-Rank Adapters of Foundation Models": "LoRAFA(start='orthonormal')"}
    full_precision = True

    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["standard", "rs"] = "standard"
    train: Literal["B", "A"] = "B"
    start: Literal["kaiming", "orthonormal"] = "kaiming"
    seed: int = 0

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / (self.rank**0.5 if self.scaling == "rs" else self.rank)

    def check(self, site: Site) -> None:
        check_rank(self, site)

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), r = site.shape, self.rank
        if self.train == "B":
            return {"A": self._drawn(site, r, d_in), "B": torch.zeros(d_out, r)}
        return {"A": torch.zeros(r, d_in), "B": self._drawn(site, d_out, r)}

    def _drawn(self, site: Site, rows: int, columns: int) -> Tensor:
        generator = seeded(self.seed, "lora_fa", site.name)
        if self.start == "kaiming":
            return frozen((2 * torch.rand(rows, columns, generator=generator) - 1) * columns**-0.5, saved=False)
        q, _ = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))
        return frozen(q if rows > columns else q.T)

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["B"], p["A"], self.factor)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["A"], self.factor * p["B"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        if self.train == "A":
            return base.low_rank(x, p["A"], p["B"], self.factor)
        y = base(x)  # base.low_rank would keep x for backward
        return base.added(y, base.apply(p["A"].to(y.dtype), x), p["B"], self.factor)
