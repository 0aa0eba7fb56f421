"""Poly and MHR: skills combined for each task (Ponti et al., EACL 2023; Caccia et al., NeurIPS 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_divides, check_rank, check_tasks
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class Poly(WeightMethod):
    r"""LoRA whose factors are, for each task, a mixture of an inventory of skills: :math:`W' = W + \frac{1}{r} (\sum_s \pi_{ts} B_s)
    (\sum_s \pi_{ts} A_s)`, :math:`\pi_t \propto \sigma(Z_t)`.

    A batch says which task each row belongs to: ``model(x, task_ids=ids)``, ids (rows,). With one task nothing is asked for, and
    the update has a merged form. In training the weights are drawn (relaxed Bernoulli variables of temperature 1).

    With ``n_splits`` above 1 the inputs of :math:`A` and the outputs of :math:`B` are cut into as many heads, each with
    weights of its own (multi-head routing, MHR).

    Args:
        rank: Rank :math:`r` of a skill.
        n_tasks: Number of tasks.
        n_skills: Number of skills.
        n_splits: Number of heads; it divides d_in and d_out.
        relaxed: Whether the weights are drawn in training, for each row; otherwise they are :math:`\sigma(Z)` there too.

    Parameters per site:
        ``A`` (n_splits, n_skills, d_in / n_splits, rank), Kaiming uniform; ``B`` (n_splits, n_skills, rank, d_out / n_splits), zeros;
        ``Z`` (n_tasks, n_splits, n_skills), uniform in [-0.001, 0.001].

    References:
        Ponti, Sordoni, Bengio and Reddy, "Combining Modular Skills in Multitask Learning" (in print "Combining
        Parameter-efficient Modules for Task-level Generalisation"), EACL 2023.
        Caccia, Ponti, Su et al., "Multi-Head Adapter Routing for Cross-Task Generalization", NeurIPS 2023.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), Poly(rank=2, n_tasks=2), where="all")
    >>> model(torch.zeros(2, 4), task_ids=torch.tensor([0, 1])).shape
    torch.Size([2, 3])
    """

    key = "poly"
    paper = "Combining Modular Skills in Multitask Learning"
    equation = r"W' = W + \frac{1}{r} \Bigl(\sum_s \pi_{ts} B_s\Bigr) \Bigl(\sum_s \pi_{ts} A_s\Bigr)"
    golden = "PEFT"
    variants: ClassVar = {"Multi-Head Adapter Routing for Cross-Task Generalization": "Poly(n_splits=4)"}

    rank: int = 8
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    relaxed: bool = True

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The rows' tasks, if there are several."""
        return ("task_ids",) if self.n_tasks > 1 else ()

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """With one task."""
        return self.n_tasks == 1

    def needs_forward(self) -> bool:
        return self.n_tasks > 1 or self.relaxed

    def check(self, site: Site) -> None:
        check_rank(self, site)
        for field in ("n_tasks", "n_skills"):
            if getattr(self, field) < 1:
                raise InputError(f"poly.{field} is {getattr(self, field)}; it must be at least 1")
        check_divides(self, site, "n_splits", site.shape[1], "inputs")
        check_divides(self, site, "n_splits", site.shape[0], "outputs")
        if self.needs_forward() and site.layer and site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(
                f"{site.name or '(model)'}: poly mixes for each row in linear layers only; leave it out of where=, or use n_tasks=1 and relaxed=False"
            )

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), q, s, r = site.shape, self.n_splits, self.n_skills, self.rank
        limit = (q / d_in) ** 0.5
        a = torch.empty(q, s, d_in // q, r, device=site.device).uniform_(-limit, limit)
        z = a.new_empty(self.n_tasks, q, s).uniform_(-1e-3, 1e-3)
        return {"A": a, "B": a.new_zeros(q, s, r, d_out // q), "Z": z}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._factors(p, p["Z"][0])
        return plus_product(w, b.T, a.T, 1 / self.rank)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        drawn = base.training and self.relaxed
        if self.n_tasks == 1 and not drawn:
            a, b = self._factors(p, p["Z"][0])
            return base.low_rank(x, a.T, b.T, 1 / self.rank)
        logits = p["Z"][self._tasks(p, x)]
        if drawn:
            least = torch.finfo(logits.dtype).eps
            logits = logits + torch.rand_like(logits).clamp(least, 1 - least).logit()
        a, b = self._factors(p, logits)
        y = base(x)
        h = x.to(y.dtype).reshape(len(x), -1, x.shape[-1]) @ a
        return torch.baddbmm(y.reshape(len(x), -1, y.shape[-1]), h, b, alpha=1 / self.rank).view(y.shape)

    def _tasks(self, p: Tensors, x: Tensor) -> Tensor:
        """The task of each row (rows,)."""
        if self.n_tasks == 1:
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        ids = p["call.task_ids"].to(x.device)
        return check_tasks(self, ids, len(x), self.n_tasks)

    def _factors(self, p: Tensors, logits: Tensor) -> tuple[Tensor, Tensor]:
        """``A`` (..., d_in, rank) and ``B`` (..., rank, d_out) mixed by ``logits`` (..., n_splits, n_skills)."""
        share = logits.sigmoid()
        share = share / (share.sum(-1, keepdim=True) + 1e-12)
        a = torch.einsum("...qs,qsdr->...qdr", share, p["A"]).flatten(-3, -2)
        return a, torch.einsum("...qs,qsrd->...rqd", share, p["B"]).flatten(-2)
