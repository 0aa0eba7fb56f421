"""BD-LoRA: Block-Diagonal LoRA (Wang et al., 2025)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_divides, check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class BDLoRA(WeightMethod):
    r"""LoRA with one block-diagonal factor: :math:`W' = W + s B A`, where :math:`A` or :math:`B` is :math:`\mathrm{diag}(X_1 \dots X_n)`.

    A model served over :math:`n` devices by tensor parallelism then needs no communication for its adapters: a layer split
    by outputs (query, key, value, up, gate) has a block-diagonal :math:`B`, one split by inputs (attention output, down)
    a block-diagonal :math:`A`.

    Args:
        rank: Rank :math:`r`; ``blocks`` divides it.
        alpha: Scale of the update; :math:`s = \alpha / r`.
        blocks: Number :math:`n` of blocks: the devices to serve on.
        diagonal: Which factor is block-diagonal: ``"A"``, ``"B"``, or ``"role"``: ``A`` at sites with the role of an attention output
            or a second feed-forward layer, ``B`` at all others.

    Parameters per site:
        ``A`` (rank, d_in) and ``B`` (d_out, rank), zeros. A block-diagonal ``A`` is stored as its blocks one beneath the other, (rank,
        d_in / blocks), and so is ``B``, (d_out, rank / blocks). ``A`` is Kaiming uniform, as in PEFT of slope 0 if block-diagonal.

    References:
        Wang et al., "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving", 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(8, 6), BDLoRA(rank=4, blocks=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(4, 8), (6, 2)]
    """

    key = "bdlora"
    paper = "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving"
    equation = r"W' = W + \frac{\alpha}{r} B\, \mathrm{diag}(A_1, \dots, A_n)"
    golden = "PEFT"
    full_precision = True

    rank: int = 8
    alpha: float = 16.0
    blocks: int = 2
    diagonal: Literal["role", "A", "B"] = "role"

    def _diagonal(self, site: Site) -> str:
        if self.diagonal != "role":
            return self.diagonal
        return "A" if site.role in ("attention.output", "mlp.down") or site.name.endswith("down_proj") else "B"

    def check(self, site: Site) -> None:
        check_rank(self, site)
        check_divides(self, site, "blocks", self.rank, "dimensions of the rank")
        if self._diagonal(site) == "A":
            check_divides(self, site, "blocks", site.shape[1], "inputs")
        else:
            check_divides(self, site, "blocks", site.shape[0], "outputs")

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), r, n = site.shape, self.rank, self.blocks
        if self._diagonal(site) == "A":
            limit = (6 * n / d_in) ** 0.5
            a = torch.empty(r, d_in // n, device=site.device).uniform_(-limit, limit)
            return {"A": a, "B": a.new_zeros(d_out, r)}
        a = torch.empty(r, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        return {"A": a, "B": a.new_zeros(d_out, r // n)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._factors(p, w.shape[1])
        return torch.addmm(w, b.to(w.dtype), a.to(w.dtype), alpha=self.alpha / self.rank)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = self._factors(p, shape[1])
        return a, self.alpha / self.rank * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *self._factors(p, base.shape[1]), self.alpha / self.rank)

    def _factors(self, p: Tensors, d_in: int) -> tuple[Tensor, Tensor]:
        """``A`` (rank, d_in) and ``B`` (d_out, rank) with their zeros; beside the inputs they are small."""
        a, b = p["A"], p["B"]
        if a.shape[1] != d_in:
            a = torch.block_diag(*a.chunk(self.blocks))
        if b.shape[1] != self.rank:
            b = torch.block_diag(*b.chunk(self.blocks))
        return a, b
