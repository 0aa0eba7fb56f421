"""MiCA: Minor Component Adaptation (Rüdiger and Raschka, 2026)."""

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
class MiCA(WeightMethod):
    r"""LoRA whose :math:`B` is frozen to the left singular vectors of the smallest singular values: :math:`W' = W + s\, U_{-r} A`.

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update; :math:`s = \alpha / r`.

    Parameters per site:
        ``A`` (rank, d_in), zeros. ``B`` (d_out, rank), orthonormal, frozen and stored: a decomposition may come out differently on
        another machine.

    References:
        Rüdiger and Raschka, "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning", 2026.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), MiCA(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 4)]
    """

    key = "mica"
    paper = "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning"
    equation = r"W' = W + s\, U_{-r:} A,\ W = U S V^\top"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    rank: int = 8
    alpha: float = 8.0

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        check_rank(self, site)

    def init(self, site: Site) -> Tensors:
        w = site.weight
        check_finite(self, site, w)
        u, _, _ = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
        return {"A": u.new_zeros(self.rank, w.shape[1]), "B": frozen(u[:, -self.rank :])}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["B"], p["A"], self.factor)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["A"], self.factor * p["B"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, p["A"], p["B"], self.factor)
