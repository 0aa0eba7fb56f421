"""EVA: Explained Variance Adaptation (Paischer et al., NeurIPS 2025)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite, check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class EVA(WeightMethod):
    r"""LoRA whose :math:`A` starts from the principal components of the layer's inputs, with ranks where these explain most variance.

    .. math:: W' = W + s_l B A, \qquad A_0 = V_{1 \dots r_l}^\top, \qquad \mathrm{Cov}(x) = V \Lambda V^\top

    Of all sites' components, at most :math:`\rho r` each, those with the largest share
    :math:`\lambda_i / \sum_j \lambda_j` of their own site's variance are kept, :math:`r` times the number of sites in all. A site may keep
    none and is then left as it is.

    Args:
        rank: Mean rank :math:`r`.
        alpha: Scale of the update.
        rho: Largest rank of a site over the mean; 1 gives all sites the same.
        adjust_scaling: Whether :math:`s_l = \alpha / r` at every site, whatever its own rank; otherwise :math:`s_l = \alpha / r_l`.

    Parameters per site:
        ``A`` (r_l, d_in), orthonormal rows; ``B`` (d_out, r_l), zeros.

    References:
        Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter, "Parameter Efficient Fine-tuning via Explained Variance
        Adaptation", NeurIPS 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model, method = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), EVA(rank=1)
    >>> statistics = exapt.calibrate(model, [torch.randn(32, 4) * torch.tensor([9.0, 1, 1, 1])], method, "all")
    >>> [tuple(p.shape) for p in exapt.trainable(exapt.attach(model, method, "all", statistics=statistics)).values()]
    [(1, 4), (3, 1), (1, 3), (3, 1)]
    """

    key = "eva"
    paper = "Parameter Efficient Fine-tuning via Explained Variance Adaptation"
    equation = r"W' = W + s B A,\ A_0 = V_{1 \dots r_l}^\top,\ \mathrm{Cov}(x) = V \Lambda V^\top"
    golden = "PEFT"
    needs = ("input_mean", "input_covariance")
    full_precision = True

    rank: int = 8
    alpha: float = 8.0
    rho: float = 2.0
    adjust_scaling: bool = True

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if self.rho < 1:
            raise InputError(f"eva.rho is {self.rho}; it is the largest rank over the mean, so at least 1")
        c = site.statistics["input_covariance"]
        if c.shape[0] != site.shape[1] or (site.layer is not None and site.layer.kind == "embedding"):
            raise InputError(f"{site.name}: its input is not what its matrix multiplies; eva serves linear layers only")
        check_finite(self, site, c, "input covariance")

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        components, shares = {}, []
        for i, site in enumerate(sites):
            mean = site.statistics["input_mean"].double()
            values, vectors = torch.linalg.eigh(site.statistics["input_covariance"].double() - mean.outer(mean))
            most = min(round(self.rank * self.rho), *site.shape)
            values, components[site.name] = values.flip(0).clamp(min=0), vectors.T.flip(0)[:most]
            share = values[:most] / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
            shares += [(-v, i) for v in share.tolist()]
        kept = [i for _, i in sorted(shares)[: self.rank * len(sites)]]
        return {s.name: {"components": components[s.name][: kept.count(i)]} for i, s in enumerate(sites)}

    def init(self, site: Site) -> Tensors:
        a = site.statistics["components"].to(site.device, torch.promote_types(site.dtype, torch.float32))
        return {"A": a, "B": a.new_zeros(site.shape[0], len(a))} if len(a) else {}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["B"], p["A"], self._factor(p)) if "A" in p else w

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        return (p["A"], self._factor(p) * p["B"]) if "A" in p else None

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, p["A"], p["B"], self._factor(p)) if "A" in p else base(x)

    def _factor(self, p: Tensors) -> float:
        return self.alpha / (self.rank if self.adjust_scaling else p["A"].shape[0])
