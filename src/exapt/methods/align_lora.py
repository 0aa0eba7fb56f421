"""Align-LoRA: one LoRA whose low-rank space is aligned across tasks (Liu et al., 2025)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class AlignLoRA(WeightMethod):
    r"""LoRA, :math:`W' = W + \frac{\alpha}{r} B A`, with a loss that draws the tasks' representations :math:`z = A x` together:
    :math:`\lambda\, \mathrm{mean}_{l, t < u}\, D(z_t^l, z_u^l)`.

    Calls in training say of which task each row is, ``model(x, domain=ids)``, ids (rows,); without it nothing is added, so that prediction asks for nothing.
    D is, as in the official code, the symmetric KL divergence of normal distributions with independent features, fitted to a
    task's rows at each position (``"kl"``; the mean over positions, :math:`10^{-8}` added to variances), or the maximum mean discrepancy with a
    Gaussian kernel :math:`e^{-\gamma \lVert z - z' \rVert^2}` of rows at each position (``"mmd"``, biased). KL leaves out tasks of one row.

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update.
        align: The weight :math:`\lambda`.
        distance: The distance D.
        gamma: The kernel's :math:`\gamma`.

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``B`` (d_out, rank), zeros. Not trained: ``layers`` (), the number of sites.

    References:
        Liu, Chang and Wu, "Align, Don't Divide: Revisiting the LoRA Architecture in Multi-Task Learning", 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), AlignLoRA(rank=2), where="all")
    >>> model(torch.randn(4, 4), domain=torch.tensor([0, 0, 1, 1])).shape, sorted(exapt.noted(model)[""])
    (torch.Size([4, 3]), ['distance'])
    """

    key = "align_lora"
    paper = "Align, Don't Divide: Revisiting the LoRA Architecture in Multi-Task Learning"
    equation = r"W' = W + \frac{\alpha}{r} B A,\; \mathcal{L} + \lambda\, \mathrm{mean}_{t<u}\, D(A x_t, A x_u)"
    golden = "NumPy"
    reads = ("domain",)
    notes: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16.0
    align: float = 0.01
    distance: Literal["kl", "mmd"] = "kl"
    gamma: float = 0.5

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if self.align < 0 or self.gamma <= 0:
            raise InputError(f"align_lora: align={self.align}, gamma={self.gamma}; align is not negative, gamma positive")

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        return {s.name: {"layers": torch.tensor(float(len(sites)))} for s in sites}

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        a = torch.empty(self.rank, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        return {"A": a, "B": a.new_zeros(d_out, self.rank), "layers": frozen(site.statistics["layers"].clone())}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return torch.addmm(w, p["B"].to(w.dtype), p["A"].to(w.dtype), alpha=self.alpha / self.rank)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        notes: Any = p["notes"]
        notes.pop("distance", None)
        tasks = p.get("call.domain")
        if tasks is not None and self.align:
            z = base.apply(p["A"], x)
            if base.kind.startswith("conv") and base.kind != "conv1d_hf":
                z = z.movedim(1, -1)
            if tasks.shape != z.shape[:1]:
                raise InputError(f"align_lora: domain holds {tuple(tasks.shape)} numbers for {len(z)} rows; give one for each, its task")
            notes["distance"] = self._distance(z.reshape(len(z), -1, z.shape[-1]), tasks)
        return base.low_rank(x, p["A"], p["B"], self.alpha / self.rank)

    def _distance(self, z: Tensor, tasks: Tensor) -> Tensor:
        """The mean over pairs of tasks; ``z`` (rows, positions, rank)."""
        groups = [g for t in tasks.unique() if len(g := z[tasks == t]) > (self.distance == "kl")]
        pairs = [(symmetric_kl(a, b) if self.distance == "kl" else discrepancy(a, b, self.gamma)) for a, b in combinations(groups, 2)]
        return torch.stack(pairs).mean() if pairs else z.new_zeros(())

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes: Any = p.get("notes", {})
        return self.align * notes["distance"] / p["layers"] if "distance" in notes else None


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """The mean over positions of the symmetric KL divergence of two groups (rows, positions, r), each normal with independent features."""
    (ma, va), (mb, vb) = ((g.mean(0), g.var(0) + 1e-8) for g in (a, b))
    gap = (ma - mb).square()
    return 0.25 * ((va + gap) / vb + (vb + gap) / va - 2).sum(-1).mean()


def discrepancy(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """The biased squared maximum mean discrepancy of two groups (rows, positions, r), the mean over positions."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-gamma * (x[:, None] - y[None]).square().sum(-1)).mean()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
