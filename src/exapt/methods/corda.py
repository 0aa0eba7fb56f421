"""CorDA: Context-Oriented Decomposition Adaptation of Large Language Models (Yang et al., NeurIPS 2024)."""

from dataclasses import dataclass
from typing import Literal

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
class CorDA(WeightMethod):
    r"""LoRA that starts from the components of :math:`W` that a context uses most, or least: :math:`W' = (W - s B_0 A_0) + s B A`.

    With the covariance :math:`C = E[x x^\top]` of the layer's inputs on a few samples and :math:`W C = U S V^\top`,

    .. math:: B_0 = U_I \sqrt{S_I / s}, \qquad A_0 = \sqrt{S_I / s}\, V_I^\top C^{-1}, \qquad s = \alpha / r

    where :math:`I` are the largest values for samples of the task to learn, the smallest for samples of the knowledge to keep.
    The update is computed as :math:`s\,((B - B_0) A + B_0 (A - A_0))`, exactly zero at the start.

    As in the authors' code one hundredth of the mean of its diagonal is added to that of :math:`C`; they double it while the inverse
    in single precision is poor, here the inverse is in double precision. :math:`C` is scaled to a mean diagonal of 1: that changes
    neither :math:`B_0 A_0` nor the choice, and keeps both factors of one size whatever the size of the inputs.

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update.
        mode: ``"instruction"`` (instruction-previewed, largest values) or ``"knowledge"`` (knowledge-preserved, smallest values).

    Parameters per site:
        ``A`` (rank, d_in) and ``B`` (d_out, rank), which train from ``A0`` and ``B0``, frozen and stored with them.

    References:
        Yang, Li, Zhou, Song, Wu, Nie, Ghanem, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
        NeurIPS 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model, method = nn.Sequential(nn.Linear(4, 3)), CorDA(rank=2, mode="knowledge")
    >>> statistics = exapt.calibrate(model, [torch.randn(32, 4)], method, "all")
    >>> exapt.parameter_count(exapt.attach(model, method, "all", statistics=statistics)).trainable
    14
    """

    key = "corda"
    paper = "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models"
    equation = r"W' = W - s B_0 A_0 + s B A,\ s B_0 A_0 = U_I S_I V_I^\top C^{-1},\ W C = U S V^\top"
    golden = "PEFT"
    needs = ("input_covariance",)
    reads_weight = True
    full_precision = True

    rank: int = 8
    alpha: float = 8.0
    mode: Literal["instruction", "knowledge"] = "instruction"

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if not self.alpha > 0:
            raise InputError(f"{site.name or '(model)'}: corda.alpha is {self.alpha}; its start divides by it, so it must be positive")
        c = site.statistics["input_covariance"]
        if c.shape[0] != site.shape[1]:
            raise InputError(f"{site.name}: its matrix has {site.shape[1]} columns, its input {c.shape[0]} features; corda serves linear layers only")
        check_finite(self, site, c, "input covariance")
        if not float(c.trace()) > 0:
            raise InputError(f"{site.name}: its inputs were all zero in the calibration; corda needs samples that reach it")

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, self.rank
        check_finite(self, site, w)
        c = site.statistics["input_covariance"].to(site.device, torch.float64)
        c = c / c.diagonal().mean() + 0.01 * torch.eye(len(c), dtype=c.dtype, device=c.device)
        u, s, vh = torch.linalg.svd(w.double() @ c, full_matrices=False)
        part = slice(None, r) if self.mode == "instruction" else slice(-r, None)
        root = (s[part] / self.factor).sqrt()
        wide = torch.promote_types(w.dtype, torch.float32)
        a, b = torch.linalg.solve(c, root[:, None] * vh[part], left=False).to(wide), (u[:, part] * root).to(wide)
        return {"A": a, "B": b, "A0": frozen(a.clone()), "B0": frozen(b.clone())}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = difference(p)
        return plus_product(w, b, a, self.factor)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = difference(p)
        return a, self.factor * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *difference(p), self.factor)
