"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models (Büyükakyüz, 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite, check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.products import plus_product
from exapt.core.rebased import difference
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class OLoRA(WeightMethod):
    r"""LoRA that starts from the QR decomposition of :math:`W`: :math:`W' = (W - s B_0 A_0) + s B A` with :math:`s = \alpha / r`.

    :math:`B_0` holds the first :math:`r` columns of :math:`Q`, which are orthonormal, and :math:`A_0` the first :math:`r` rows of
    :math:`R`, where :math:`W = Q R`. The base keeps its weight; the update is computed as
    :math:`s\,((B - B_0) A + B_0 (A - A_0))`, exactly zero at the start.

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update. The part taken from :math:`W` is :math:`s Q_r R_r`, so that :math:`\alpha = r` takes it once.

    Parameters per site:
        ``A`` (rank, d_in) and ``B`` (d_out, rank), which train from ``A0`` and ``B0``, frozen and stored with them.

    References:
        Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), OLoRA(rank=2), where="all")
    >>> B = model.get_parameter("exapt.default.B")
    >>> torch.allclose(B.T @ B, torch.eye(2), atol=1e-6)
    True
    """

    key = "olora"
    paper = "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models"
    equation = r"W' = W - s B_0 A_0 + s B A,\ B_0 A_0 = Q_{:r} R_{:r},\ W = Q R"
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
        w, r = site.weight, self.rank
        check_finite(self, site, w)
        q, upper = torch.linalg.qr(w.to(torch.promote_types(w.dtype, torch.float32)))
        a, b = upper[:r], q[:, :r]
        return {"A": a, "B": b, "A0": frozen(a.clone()), "B0": frozen(b.clone())}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = difference(p)
        return plus_product(w, b, a, self.factor)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = difference(p)
        return a, self.factor * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *difference(p), self.factor)
