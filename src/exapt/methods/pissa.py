"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al., NeurIPS 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite, check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.rebased import difference
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class PiSSA(WeightMethod):
    r"""LoRA that starts from the principal part of :math:`W`: :math:`W' = (W - s B_0 A_0) + s B A` with :math:`s = \alpha / r`.

    With the singular value decomposition :math:`W = U S V^\top`, cut after :math:`r` values,

    .. math:: B_0 = U_r \sqrt{S_r / s}, \qquad A_0 = \sqrt{S_r / s}\, V_r^\top.

    The base keeps its weight: the residual :math:`W - s B_0 A_0` is never stored. The update is computed as
    :math:`s\,((B - B_0) A + B_0 (A - A_0))`, a product of rank :math:`2r` that is exactly zero at the start and does not lose
    small changes in half precision.

    Args:
        rank: Rank :math:`r`, at most the number of singular values.
        alpha: Scale of the update; the paper sets it to the rank.
        niter: Number of subspace iterations of the randomised decomposition; 0: the exact one.

    Parameters per site:
        ``A`` (rank, d_in) and ``B`` (d_out, rank), which train from ``A0`` and ``B0``, frozen and stored with them: a
        decomposition may come out differently on another machine.

    References:
        Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        NeurIPS 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), PiSSA(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 4), (3, 2)]
    """

    key = "pissa"
    paper = "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models"
    equation = r"W' = W - s B_0 A_0 + s B A,\ s B_0 A_0 = U_{:r} S_{:r} V_{:r}^\top"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    rank: int = 16
    alpha: float = 16.0
    niter: int = 0

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if not self.alpha > 0:
            raise InputError(f"{site.name or '(model)'}: pissa.alpha is {self.alpha}; its start divides by it, so it must be positive")

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, self.rank
        check_finite(self, site, w)
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        if self.niter:
            u, s, v = torch.svd_lowrank(w, r, self.niter)
            vh = v.T
        else:
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
        root = (s[:r] / self.factor).sqrt()
        a, b = root[:, None] * vh[:r], u[:, :r] * root
        return {"A": a, "B": b, "A0": frozen(a.clone()), "B0": frozen(b.clone())}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = difference(p)
        return plus_product(w, b, a, self.factor)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = difference(p)
        return a, self.factor * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *difference(p), self.factor)
