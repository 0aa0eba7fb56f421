"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini, Girrbach and Akata, ICLR 2025)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class DeLoRA(WeightMethod):
    r"""Adds :math:`r` normalised rank-one updates of a learned common strength:

    .. math:: W' = W + \frac{\lambda}{r} \sum_{i=1}^r \frac{b_i a_i^\top}{\lVert b_i \rVert \lVert a_i \rVert}\, \mathrm{diag}(n)

    with :math:`n_j` the norm of column :math:`j` of :math:`W`. So the angles train apart from the strength, and the update is bounded:
    :math:`\lVert W' - W \rVert_F \le \lambda \max_j n_j`. This is the form in PEFT, which scales by the norms of columns and starts
    from zeros; norms below 1e-4 count as 1e-4.

    Args:
        rank: Rank :math:`r` of the update.
        delora_lambda: Start of the strength :math:`\lambda`.
        dropout: Probability of dropping an input feature of the update in training.

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``B`` (d_out, rank), zeros; ``lambda`` (1,); frozen ``w_norm`` (d_in,), the :math:`n_j`.

    References:
        Bini, Girrbach and Akata, "Decoupling Angles and Strength in Low-rank Adaptation", ICLR 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), DeLoRA(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 4), (3, 2), (1,)]
    """

    key = "delora"
    paper = "Decoupling Angles and Strength in Low-rank Adaptation"
    equation = r"W' = W + \frac{\lambda}{r} \sum_{i=1}^r \frac{b_i a_i^\top}{\lVert b_i \rVert \lVert a_i \rVert}\, \mathrm{diag}(\lVert W_{:,j} \rVert)"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    rank: int = 8
    delora_lambda: float = 15.0
    dropout: float = 0.0

    def check(self, site: Site) -> None:
        if self.rank < 1:
            raise InputError(f"{site.name or '(model)'}: delora.rank is {self.rank}; it must be at least 1")

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        w = site.weight
        a = torch.empty(self.rank, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)  # Kaiming uniform, slope sqrt(5)
        norm = w.to(torch.promote_types(w.dtype, torch.float32)).square().sum(0).sqrt()  # vector_norm along columns is six times slower
        return {"A": a, "B": a.new_zeros(d_out, self.rank), "lambda": a.new_full((1,), self.delora_lambda), "w_norm": frozen(norm)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._factors(p)
        return plus_product(w, b, a)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self._factors(p)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        a, b = self._factors(p)
        dropped = F.dropout(x, self.dropout, base.training) if self.dropout and x.is_floating_point() else None
        return base.low_rank(x, a, b, 1.0, dropped)

    def _factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        lengths = p["A"].norm(dim=1).clamp(min=1e-4) * p["B"].norm(dim=0).clamp(min=1e-4)
        return p["A"] * p["w_norm"], p["B"] * (p["lambda"] / self.rank / lengths)

    def needs_forward(self) -> bool:
        return self.dropout > 0
