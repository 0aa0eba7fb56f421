"""MTL-LoRA: low-rank adaptation for multi-task learning (Yang et al., AAAI 2025)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank, check_tasks
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class MTLLoRA(WeightMethod):
    r"""LoRA with a transform of the low-rank space and a blend of up-projections for each task:
    :math:`W_t' = W + \frac{\alpha}{r} \bigl(\sum_i w_{ti} B_i\bigr) \Lambda_t A`, :math:`w_t = \mathrm{softmax}(z_t / \tau)`.

    A batch says which task each row belongs to: ``model(x, task_ids=ids)``, ids (rows,). With one task nothing is asked for, and the update has a
    merged form.

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update.
        n_tasks: Number of tasks.
        n_up: Number of up-projections :math:`B_i`.
        temperature: The temperature :math:`\tau`; small ones let a task choose.

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``Lambda`` (n_tasks, rank, rank), identities; ``B`` (n_up, d_out, rank), zeros; ``z`` (n_tasks, n_up), Kaiming
        uniform.

    References:
        Yang, Muhtar, Shen, Zhan, Liu, Wang, Sun, Deng, Sun, Zhang, Chen and Zhang, "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning", AAAI 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), MTLLoRA(rank=2, n_tasks=2), where="all")
    >>> model(torch.zeros(2, 4), task_ids=torch.tensor([0, 1])).shape
    torch.Size([2, 3])
    """

    key = "mtl_lora"
    paper = "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning"
    equation = r"W_t' = W + \frac{\alpha}{r} \Bigl(\sum_i w_{ti} B_i\Bigr) \Lambda_t A"
    golden = "NumPy"

    rank: int = 8
    alpha: float = 16.0
    n_tasks: int = 1
    n_up: int = 3
    temperature: float = 0.1

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The rows' tasks, if there are several."""
        return ("task_ids",) if self.n_tasks > 1 else ()

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """With one task."""
        return self.n_tasks == 1

    def needs_forward(self) -> bool:
        return self.n_tasks > 1

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if min(self.n_tasks, self.n_up) < 1 or self.temperature <= 0:
            raise InputError(f"mtl_lora: n_tasks={self.n_tasks}, n_up={self.n_up}, temperature={self.temperature}; at least 1, at least 1, above 0")
        if self.n_tasks > 1 and site.layer and site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: mtl_lora tells tasks apart in linear layers only; leave it out of where=, or use n_tasks=1")

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), r = site.shape, self.rank
        a = torch.empty(r, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        z = a.new_empty(self.n_tasks, self.n_up).uniform_(-(self.n_up**-0.5), self.n_up**-0.5)
        return {"A": a, "Lambda": torch.eye(r, device=site.device).repeat(self.n_tasks, 1, 1), "B": a.new_zeros(self.n_up, d_out, r), "z": z}

    def _up(self, p: Tensors) -> Tensor:
        """The tasks' up-projections with their transforms (n_tasks, d_out, rank)."""
        return torch.einsum("ti,ior->tor", (p["z"] / self.temperature).softmax(-1), p["B"]) @ p["Lambda"]

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return w + self.alpha / self.rank * (self._up(p)[0] @ p["A"]).to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        if self.n_tasks == 1:
            return base.low_rank(x, p["A"], self._up(p)[0], self.alpha / self.rank)
        ids, y = p["call.task_ids"].to(x.device), base(x)
        ids = check_tasks(self, ids, len(x), self.n_tasks)
        low = x.to(y.dtype).reshape(len(x), -1, x.shape[-1]) @ p["A"].T.to(y.dtype)
        return torch.add(y, (low @ self._up(p)[ids].mT.to(y.dtype)).view(y.shape), alpha=self.alpha / self.rank)
