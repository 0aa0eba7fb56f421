"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., ICML 2024)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.kept import kept
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class DoRA(WeightMethod):
    r"""Trains the length of every row of :math:`W` apart from its direction, which takes a low-rank update.

    .. math:: W' = \frac{m}{\lVert V \rVert} \odot V, \qquad V = W + s B A, \qquad s = \alpha / r

    with one norm per output feature. As in section 4.3 of the paper the norm counts as a constant in the gradient.

    Args:
        rank: Rank :math:`r` of the update.
        alpha: Scale of the update.
        scaling: ``"standard"``: :math:`\alpha / r`; ``"rs"``: :math:`\alpha / \sqrt r` (rsLoRA).

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``B`` (d_out, rank), zeros; ``m`` (d_out,), the norms of the rows of :math:`W`.

    The fast path needs neither :math:`BA` nor :math:`V`: a row's squared norm is
    :math:`\lVert W_i \rVert^2 + 2 s \langle W_i A^\top, B_i \rangle + s^2 B_i (A A^\top) B_i^\top`.

    References:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), DoRA(rank=2), where="all")
    >>> sorted(tuple(p.shape) for p in exapt.trainable(model).values())
    [(2, 4), (3,), (3, 2)]
    """

    key = "dora"
    paper = "DoRA: Weight-Decomposed Low-Rank Adaptation"
    equation = r"W' = m \odot \frac{W + s B A}{\lVert W + s B A \rVert}"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["standard", "rs"] = "standard"

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / (self.rank**0.5 if self.scaling == "rs" else self.rank)

    def check(self, site: Site) -> None:
        check_rank(self, site)

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        w = site.weight
        a = nn.init.kaiming_uniform_(torch.empty(self.rank, d_in, device=site.device), a=5**0.5)
        return {"A": a, "B": a.new_zeros(d_out, self.rank), "m": torch.linalg.vector_norm(w, dim=1, dtype=_wide(w))}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        v = w + self.factor * p["B"] @ p["A"]
        gain = p["m"] / _no_zero(torch.linalg.vector_norm(v.detach(), dim=1))
        return (gain[:, None] * v).to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        gain = kept(base, lambda: p["m"] / self._norm(p, base), p["A"], p["B"], p["m"])
        y = base.low_rank(x, p["A"], p["B"], self.factor, biased=False)  # the bias is not scaled
        if base.bias is None:
            return base.scale(gain.to(y.dtype), y)
        if base.kind in ("linear", "conv1d_hf"):
            return torch.addcmul(base.bias.to(y.dtype), y, gain.to(y.dtype))
        return base.scale(gain.to(y.dtype), y) + base.scale(base.bias.to(y.dtype), y.new_ones(()))

    @torch.no_grad()
    def _norm(self, p: Tensors, base: Base) -> Tensor:
        """Norms of the rows of ``W + s B A``, without forming it."""
        A, B, s, w = p["A"], p["B"], self.factor, base.weight
        own = kept(base, lambda: torch.linalg.vector_norm(w, dim=1, dtype=_wide(w)).square())
        cross = (w @ A.T.to(w.dtype)).to(B.dtype)
        update = B @ (A @ A.T)
        return _no_zero((own + (2 * s * cross + s**2 * update).mul(B).sum(1)).clamp(min=0).sqrt())


def _wide(w: Tensor) -> torch.dtype:
    return torch.promote_types(w.dtype, torch.float32)


def _no_zero(norm: Tensor) -> Tensor:
    """A row of zeros has no direction: it stays as it is instead of turning to NaN."""
    return torch.where(norm > 0, norm, torch.ones_like(norm))
