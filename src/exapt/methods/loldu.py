"""LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition (Shi et al., 2024)."""

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
class LoLDU(WeightMethod):
    r"""Trains the diagonal of a lower-diagonal-upper decomposition: :math:`W' = W + P L_r\, \mathrm{diag}(s z - s_0 z_0)\, U_r`.

    :math:`W = P L\, \mathrm{diag}(z_0)\, U` by elimination with row exchanges :math:`P`; :math:`L` and :math:`U` have ones on their
    diagonals. The first :math:`r` entries of the diagonal and a scale train. The official code writes the same as a residual
    weight plus :math:`s P L_r\, \mathrm{diag}(z)\, U_r`; here the base keeps its weight. Its optimiser gets :math:`z` alone.

    Args:
        rank: Number :math:`r` of diagonal entries that train; the paper goes up to all.
        alpha: Start of the scale times the rank: :math:`s_0 = \alpha / r`.
        train_scale: Whether the scale :math:`s` trains.

    Parameters per site:
        ``z`` (rank,), which trains from ``z0``, and ``s`` (1,), frozen unless ``train_scale``. Frozen and stored: ``z0``,
        ``L`` (d_out, rank), the rows exchanged back, and ``U`` (rank, d_in).

    References:
        Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(40, 30), LoLDU(rank=8), where="all")
    >>> exapt.parameter_count(model).trainable
    9
    """

    key = "loldu"
    paper = "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning"
    equation = r"W' = W + P L_{:r}\, \mathrm{diag}(s z - s_0 z_0)\, U_{:r},\ W = P L\, \mathrm{diag}(z_0)\, U"
    golden = "NumPy"
    reads_weight = True
    full_precision = True

    rank: int = 32
    alpha: float = 32.0
    train_scale: bool = True

    def check(self, site: Site) -> None:
        check_rank(self, site)

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, self.rank
        check_finite(self, site, w)
        exchange, lower, upper = torch.linalg.lu(w.to(torch.promote_types(w.dtype, torch.float32)))
        z = upper.diagonal()[:r].clone()
        rows = upper[:r] / torch.where(z == 0, 1, z)[:, None]  # of a singular matrix a row may have no pivot: it stays as it is
        scale = torch.full((1,), self.alpha / r, dtype=z.dtype, device=z.device)
        fixed = {"z0": frozen(z.clone()), "L": frozen(exchange @ lower[:, :r]), "U": frozen(rows)}
        return {"z": z, "s": scale if self.train_scale else frozen(scale), **fixed}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["L"] * self._change(p), p["U"])

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        # step by step only r features are kept for backward; base.low_rank would keep x
        y = base(x)
        h = base.scale(self._change(p).to(y.dtype), base.apply(p["U"].to(y.dtype), x))
        return base.added(y, h, p["L"])

    def _change(self, p: Tensors) -> Tensor:
        """The change of the diagonal (rank,)."""
        return p["s"] * p["z"] - self.alpha / self.rank * p["z0"]
