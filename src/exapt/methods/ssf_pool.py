"""A pool of SSF modules matched to each instance (FedIns, Feng et al., ICCV 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.contract import ActivationMethod, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class SSFPool(ActivationMethod):
    r"""Scales and shifts features by the mean of the modules of a pool whose keys fit the instance best:
    :math:`h' = \bar\gamma \odot h + \bar\beta`, :math:`(\bar\gamma, \bar\beta) = \frac1K \sum_{i \in T(q)} (\gamma_i, \beta_i)`.

    :math:`T(q)` are the ``top_k`` keys of the largest cosine with the instance's query, which comes with the call: ``model(x, queries=q)``, q (rows, width),
    features of the base model on the same rows (``with exapt.disabled(model)``; the class token's in the paper). The keys learn by the loss's
    share :math:`\lambda (1 - \bar s)`, :math:`\bar s` the mean cosine of matched keys. With a pool of one module nothing is asked for.

    Each client of a federation trains the pool on its rows; the server averages the pools (:func:`exapt.algebra.federated.federated_average`), keys and all.
    The official code matches one instance at a time; here every row of a batch is matched for itself.

    Args:
        pool: Number of modules; the official code's 25.
        top_k: How many an instance is matched with, at most ``pool``; the official code's 3.
        width: Features of a query.
        weight: The factor :math:`\lambda`; the official code's losses are weighted 0.9 and 0.1, which is 1 / 9.
        std: Standard deviation of the start, :math:`\gamma \sim N(1, \mathrm{std}^2)`, :math:`\beta \sim N(0, \mathrm{std}^2)`; the official code's is
            0.02. The default of 0 starts exactly at the base model.

    Parameters per site:
        ``gamma``, ``beta`` (pool, d); ``place`` (1,), which site, not trained. Shared by all sites, if there is a choice: ``keys`` (pool, width),
        normal with deviation 0.02.

    References:
        Feng, Yu, Liu, Xu, Khan and Zuo, "Towards Instance-adaptive Inference for Federated Learning", ICCV 2023.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Sequential(nn.Linear(4, 3)), SSFPool(pool=5, width=4), where="0")
    >>> model(torch.ones(2, 4), queries=torch.ones(2, 4)).shape
    torch.Size([2, 3])
    """

    key = "ssf_pool"
    paper = "Towards Instance-adaptive Inference for Federated Learning"
    equation = r"h' = \bar\gamma \odot h + \bar\beta,\; (\bar\gamma, \bar\beta) = \frac1K \sum_{i \in T(q)} (\gamma_i, \beta_i)"
    golden = "NumPy"
    where = ("linear", "conv", "norm")
    notes: ClassVar = True

    pool: int = 1
    top_k: int = 3
    width: int = 768
    weight: float = 1 / 9
    std: float = 0.0

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The queries, if there is a choice."""
        return ("queries",) if self.pool > 1 else ()

    def check(self, site: Site) -> None:
        for field in ("pool", "top_k", "width"):
            if getattr(self, field) < 1:
                raise InputError(f"ssf_pool.{field} is {getattr(self, field)}; it must be at least 1")

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        return {s.name: {"place": torch.tensor([i])} for i, s in enumerate(sites)}

    def shared(self, sites: Sequence[Site]) -> Tensors:
        return {"keys": 0.02 * torch.randn(self.pool, self.width, device=sites[0].device)} if self.pool > 1 else {}

    def init(self, site: Site) -> Tensors:
        noise = self.std * torch.randn(2, self.pool, site.features, device=site.device)
        return {"gamma": 1 + noise[0], "beta": noise[1], "place": frozen(site.statistics["place"].clone())}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        if self.pool == 1:
            return torch.addcmul(p["beta"][0], p["gamma"][0], h)
        q = p["call.queries"]
        if q.shape != (len(h), self.width):
            raise InputError(f"ssf_pool was given queries of shape {tuple(q.shape)}; {len(h)} rows with width={self.width} need ({len(h)}, {self.width})")
        cosine = F.normalize(q.to(p["keys"].dtype), dim=-1) @ F.normalize(p["keys"], dim=-1).T
        best, index = cosine.topk(min(self.top_k, self.pool), -1)
        cast(Tensors, p["notes"]).update({"similarity": best.mean(), "chosen": index})
        gamma, beta = (p[k][index].mean(1).view(len(h), *[1] * (h.dim() - 2), -1) for k in ("gamma", "beta"))
        return torch.addcmul(beta, gamma, h)

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes = cast(Tensors, p["notes"])
        if "similarity" not in notes or not self.weight or int(p["place"]):
            return None
        return self.weight * (1 - notes["similarity"])
