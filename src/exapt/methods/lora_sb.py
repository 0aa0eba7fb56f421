"""LoRA-SB: Initialization using Update Approximation is a Silver Bullet (Ponkshe, Singhal et al., 2024)."""

from dataclasses import dataclass
from typing import ClassVar

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
class LoRASB(WeightMethod):
    r"""Starts LoRA-XS from the first step of full fine-tuning: :math:`W' = W + B R A`, of which only :math:`R` trains.

    The first step of Adam would be :math:`\Delta = -\eta\, \mathrm{sign}(G)`, with :math:`G` the mean gradient of the loss
    over some examples. Its singular value decomposition, cut after :math:`r` values, gives

    .. math:: B = U_r, \qquad R_0 = S_r, \qquad A = V_r^\top,

    so that training begins at the best rank-:math:`r` part of that step, and, the frozen factors being orthonormal, the
    gradient of :math:`R` is that of :math:`W` seen in their subspace: no scale is left to tune.

    Args:
        rank: Rank :math:`r`.
        eta: Size :math:`\eta` of the estimated step. The official code takes the learning rate of the first warm-up step: the
            peak over the number of warm-up steps.
        niter: Number of subspace iterations of the randomised decomposition (the official code takes 10); 0: the exact one.
            It is refused where a singular vector misses by more than 10% of the largest singular value.

    Parameters per site:
        ``R`` (rank, rank), from the estimated step. Frozen and stored: ``A`` (rank, d_in), ``B`` (d_out, rank).

    References:
        Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma, "Initialization using Update Approximation is a Silver Bullet
        for Extremely Efficient Low-Rank Fine-Tuning", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> layer, x = nn.Linear(40, 30), torch.randn(8, 40)
    >>> statistics = exapt.calibrate(layer, [x], LoRASB(rank=4), "all", loss=lambda model, x: model(x).square().mean())
    >>> exapt.parameter_count(exapt.attach(layer, LoRASB(rank=4), "all", statistics=statistics)).trainable
    16
    """

    key = "lora_sb"
    paper = "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning"
    equation = r"W' = W + B R A,\ B R_0 A = -\eta\,[\mathrm{sign}(G)]_r"
    golden = "NumPy"
    needs = ("gradient",)
    full_precision = True
    exceptions: ClassVar = {
        "identity": "training begins at the estimated first step of full fine-tuning",
        "quantised": "the estimated step needs the weight's gradient, which a quantised weight has not",
        "precision": "singular vectors of small values of the estimated step come out differently from a model in half precision",
    }

    rank: int = 32
    eta: float = 1e-5
    niter: int = 0

    def check(self, site: Site) -> None:
        check_rank(self, site)

    def init(self, site: Site) -> Tensors:
        assert site.layer is not None
        g, r = site.layer.to_matrix(site.statistics["gradient"]), self.rank
        check_finite(self, site, g, "gradient")
        if not bool(g.any()):
            raise InputError(f"{site.name or '(model)'}: its gradient is zero, so lora_sb has no step to start from; leave the site out of where=")
        step = -self.eta * g.to(torch.promote_types(g.dtype, torch.float32)).sign()
        if self.niter:
            u, s, v = torch.svd_lowrank(step, r, self.niter)
            vh = v.T
            missed = max(float(t.norm(dim=0).max()) for t in (step @ v - u * s, step.T @ u - v * s))
            if missed > 0.1 * float(s[0]):
                raise InputError(
                    f"{site.name or '(model)'}: {self.niter} iterations do not find its {r} largest components; raise lora_sb.niter or set it to 0"
                )
        else:
            u, s, vh = torch.linalg.svd(step, full_matrices=False)
        return {"R": s[:r].diag(), "A": frozen(vh[:r].contiguous()), "B": frozen(u[:, :r].contiguous())}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["B"], p["R"] @ p["A"])

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["R"] @ p["A"], p["B"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        # step by step only the r features between A and R are kept for backward; base.low_rank would keep x
        y = base(x)
        h = base.out(p["R"].to(y.dtype), base.apply(p["A"].to(y.dtype), x))
        return base.added(y, h, p["B"])
