"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (Bałazy et al., 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite, check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class LoRAXS(WeightMethod):
    r"""Trains an :math:`r \times r` matrix between the frozen principal factors of :math:`W`: :math:`W' = W + s B R A` with
    :math:`s = \alpha / r`.

    With the singular value decomposition :math:`W = U S V^\top`, cut after :math:`r` values, :math:`B = U_r` and
    :math:`A = S_r V_r^\top`. The singular values stand with :math:`A`, as in the official code, which decomposes the
    transpose of :math:`W`.

    Args:
        rank: Rank :math:`r` of the update.
        alpha: Scale of the update.
        sigma: Standard deviation of the start of :math:`R`. The official code draws with 1e-5; the default here is 0, which
            starts exactly at the base model and has the same gradient.
        niter: Number of subspace iterations of the randomised decomposition (the official code takes 10); 0: the exact one.
            It is refused where a singular vector misses by more than 10% of the largest singular value.

    Parameters per site:
        ``R`` (rank, rank). Frozen and stored: ``A`` (rank, d_in), ``B`` (d_out, rank); a decomposition may come out
        differently on another machine.

    References:
        Bałazy, Banaei, Aberer, Tabor, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(40, 30), LoRAXS(rank=4), where="all")
    >>> exapt.parameter_count(model).trainable
    16
    """

    key = "lora_xs"
    paper = "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters"
    equation = r"W' = W + s\, U_{:r} R\, S_{:r} V_{:r}^\top"
    golden = "NumPy"
    reads_weight = True
    full_precision = True

    rank: int = 16
    alpha: float = 16.0
    sigma: float = 0.0
    niter: int = 0

    def check(self, site: Site) -> None:
        check_rank(self, site)

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, self.rank
        check_finite(self, site, w)
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        if self.niter:
            u, s, v = torch.svd_lowrank(w, r, self.niter)
            vh = v.T
            missed = max(float(t.norm(dim=0).max()) for t in (w @ v - u * s, w.T @ u - v * s))
            if missed > 0.1 * float(s[0]):
                raise InputError(
                    f"{site.name or '(model)'}: {self.niter} iterations do not find its {r} largest components; raise lora_xs.niter or set it to 0"
                )
        else:
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
        start = self.sigma * torch.randn(r, r, device=w.device)
        return {"R": start, "A": frozen(s[:r, None] * vh[:r]), "B": frozen(u[:, :r].contiguous())}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["B"], p["R"] @ p["A"], self.alpha / self.rank)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["R"] @ p["A"], self.alpha / self.rank * p["B"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        # step by step only the r features between A and R are kept for backward; base.low_rank would keep x
        y = base(x)
        h = base.out((self.alpha / self.rank * p["R"]).to(y.dtype), base.apply(p["A"].to(y.dtype), x))
        return base.added(y, h, p["B"])
