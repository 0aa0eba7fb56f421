"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al., NeurIPS 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

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
class LoRAGA(WeightMethod):
    r"""LoRA that starts from singular vectors of the gradient :math:`G = U S V^\top` of :math:`W`: :math:`W' = (W - s B_0 A_0) + s B A`.

    .. math:: A_0 = c\, V_{1 \dots r}^\top, \qquad B_0 = c\, U_{r + 1 \dots 2 r}, \qquad c = d_{out}^{1/4} / \sqrt{\gamma}

    so that the first step of the product comes nearest to a step of full fine-tuning. The update is computed as
    :math:`s\,((B - B_0) A + B_0 (A - A_0))`, exactly zero at the start. This follows the paper and the authors' code; PEFT 0.21
    scales ``B`` alone, and by the gradient's singular values too.

    Args:
        rank: Rank :math:`r`; a gradient has to offer :math:`2 r` singular vectors.
        alpha: Scale of the update.
        scaling: ``"standard"``: :math:`s = \alpha / r`; ``"rs"``: :math:`s = \alpha / \sqrt r`, the paper's.
        direction: Which vectors ``A`` and ``B`` take: ``"ArB2r"`` as above, ``"A2rBr"`` the other way round, ``"ArBr"`` ``B`` the 1st, 3rd,
            ... and ``A`` the 2nd, 4th, ..., ``"random"`` half of the :math:`2 r` each.
        scale: The factor :math:`c`: ``"stable"`` as above, ``"unit"`` 1, ``"gd"`` :math:`1 / s`, ``"weight"`` the mean root of the :math:`r`
            largest singular values of :math:`W / s`.
        gamma: :math:`\gamma`; larger starts smaller.
        niter: Number of subspace iterations of the randomised decompositions; 0: exact ones.

    Parameters per site:
        ``A`` (rank, d_in) and ``B`` (d_out, rank), which train from ``A0`` and ``B0``, frozen and stored with them.

    References:
        Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model, method = nn.Sequential(nn.Linear(6, 5)), LoRAGA(rank=2)
    >>> statistics = exapt.calibrate(model, [torch.randn(32, 6)], method, "all", loss=lambda m, x: m(x).square().mean())
    >>> exapt.parameter_count(exapt.attach(model, method, "all", statistics=statistics)).trainable
    22
    """

    key = "lora_ga"
    paper = "LoRA-GA: Low-Rank Adaptation with Gradient Approximation"
    equation = r"W' = W - s B_0 A_0 + s B A,\ A_0 = c V_{1 \dots r}^\top,\ B_0 = c U_{r+1 \dots 2r},\ \nabla_W = U S V^\top"
    golden = "NumPy"
    needs = ("gradient",)
    reads_weight = True
    full_precision = True
    exceptions: ClassVar = {
        "quantised": "calibrate collects no gradient of a quantised weight; calibrate before quantising",
        "precision": "singular vectors of small values of a gradient come out differently from a model in half precision",
    }

    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["standard", "rs"] = "rs"
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "unit", "gd", "weight"] = "stable"
    gamma: float = 16.0
    niter: int = 4

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / (self.rank**0.5 if self.scaling == "rs" else self.rank)

    def check(self, site: Site) -> None:
        check_rank(self, site, most=min(site.shape) // 2)
        if not (self.alpha > 0 and self.gamma > 0):
            raise InputError(
                f"{site.name or '(model)'}: lora_ga.alpha is {self.alpha}, lora_ga.gamma {self.gamma}; its start divides by them; make them positive"
            )
        g = site.statistics["gradient"]
        if g.numel() != site.shape[0] * site.shape[1] * (site.layer.stacked or 1 if site.layer else 1):
            raise InputError(f"{site.name}: no gradient of its weight was collected (is it quantised?); calibrate the model before quantising it")
        check_finite(self, site, g, "gradient")
        if not bool(g.any()):
            raise InputError(f"{site.name or '(model)'}: its gradient is zero, so lora_ga has no direction to start from; leave the site out of where=")

    def init(self, site: Site) -> Tensors:
        assert site.layer is not None
        w, r = site.weight, self.rank
        wide = torch.promote_types(w.dtype, torch.float32)
        g = site.layer.to_matrix(site.statistics["gradient"].to(site.device, wide))
        g = g[getattr(site, "expert", 0)] if g.dim() == 3 else g
        u, _, vh = self._svd(g)
        order = torch.randperm(2 * r) if self.direction == "random" else torch.arange(2 * r)
        left, right = order[:r], order[r:]
        if self.direction == "ArB2r":
            left, right = right, left
        elif self.direction == "ArBr":
            left, right = order[::2], order[1::2]
        c = self._size(w.to(wide))
        a, b = c * vh[right], c * u[:, left]
        return {"A": a, "B": b, "A0": frozen(a.clone()), "B0": frozen(b.clone())}

    def _svd(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.niter:
            u, s, vh = torch.linalg.svd(m, full_matrices=False)
            return u, s, vh
        u, s, v = torch.svd_lowrank(m, min(4 * self.rank, *m.shape), self.niter)
        return u, s, v.T

    def _size(self, w: Tensor) -> float:
        if self.scale == "stable":
            return float(w.shape[0] ** 0.25 / self.gamma**0.5)
        if self.scale == "weight":
            return float((self._svd(w)[1][: self.rank] / self.factor).sqrt().mean())
        return 1 / self.factor if self.scale == "gd" else 1.0

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = difference(p)
        return plus_product(w, b, a, self.factor)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = difference(p)
        return a, self.factor * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *difference(p), self.factor)
