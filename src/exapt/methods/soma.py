"""SoMA: Singular Value Decomposed Minor Components Adaptation (Yun et al., CVPR 2025)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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
class SoMA(WeightMethod):
    r"""LoRA that starts from the minor part of :math:`W`: :math:`W' = (W - s B_0 A_0) + s B A` with :math:`s = \alpha / r`.

    With :math:`W = U S V^\top` and its :math:`r` smallest singular values, :math:`B_0 = U_{-r} \sqrt{S_{-r} / s}` and
    :math:`A_0 = \sqrt{S_{-r} / s}\, V_{-r}^\top`; what generalises, the rest of :math:`W`, stays frozen. The update is computed as
    :math:`s\,((B - B_0) A + B_0 (A - A_0))`, exactly zero at the start.

    The authors also leave the first blocks alone (name the later ones in ``where``) and anneal the adapter's weight decay by
    a cosine from the start to the end of training; ``decay`` does that here, so give the optimiser no decay of its own.

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update; the authors set it to the rank.
        decay: Fraction of ``A`` and ``B`` taken off at the first step (weight decay times learning rate, in the authors'
            configuration 0.05 times 5e-5), annealed to zero at the last.

    Parameters per site:
        ``A`` (rank, d_in) and ``B`` (d_out, rank), which train from ``A0`` and ``B0``, frozen and stored with them.

    References:
        Yun, Chae, Lee and Ro, "SoMA: Singular Value Decomposed Minor Components Adaptation for Domain Generalizable
        Representation Learning", CVPR 2025.
        Wang et al., "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning", NAACL 2025: the
        same start, without the decay.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), SoMA(rank=2), where="all")
    >>> exapt.parameter_count(model).trainable
    14
    """

    key = "soma"
    paper = "SoMA: Singular Value Decomposed Minor Components Adaptation for Domain Generalizable Representation Learning"
    equation = r"W' = W - s B_0 A_0 + s B A,\ s B_0 A_0 = U_{-r:} S_{-r:} V_{-r:}^\top"
    golden = "NumPy"
    variants: ClassVar = {"MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning": "SoMA(decay=0.0)"}
    reads_weight = True
    full_precision = True

    rank: int = 16
    alpha: float = 16.0
    decay: float = 2.5e-6

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if not self.alpha > 0:
            raise InputError(f"{site.name or '(model)'}: soma.alpha is {self.alpha}; its start divides by it, so it must be positive")

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, self.rank
        check_finite(self, site, w)
        u, s, vh = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
        root = (s[-r:] / self.factor).sqrt()
        a, b = root[:, None] * vh[-r:], u[:, -r:] * root
        return {"A": a, "B": b, "A0": frozen(a.clone()), "B0": frozen(b.clone())}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = difference(p)
        return plus_product(w, b, a, self.factor)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = difference(p)
        return a, self.factor * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *difference(p), self.factor)

    def on_step(self, tensors: Mapping[str, Tensors], step: int, total: int) -> None:
        kept = 1 - self.decay * (1 + math.cos(math.pi * (step - 1) / max(1, total - 1))) / 2
        for p in tensors.values():
            p["A"].mul_(kept)
            p["B"].mul_(kept)
