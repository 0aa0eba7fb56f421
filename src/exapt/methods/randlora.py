"""RandLoRA: Full-rank parameter-efficient fine-tuning of large models (Albert et al., ICLR 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class RandLoRA(WeightMethod):
    r"""A full-rank update from scaled random bases: :math:`W' = W + s \sum_{i=1}^{n} B_i \Lambda_i A\, \Gamma_i`.

    :math:`s = \alpha / r`. :math:`A` and the :math:`n = \lceil \min(d_{out}, d_{in}) / r \rceil` matrices :math:`B_i` are
    random, frozen and shared by all sites; the diagonal :math:`\Lambda_i` (:math:`r`) and :math:`\Gamma_i` train. :math:`A`
    stands on the shorter side: where :math:`d_{in} > d_{out}` the update is transposed. A site uses the first rows, columns
    and bases. As in the authors' code, the :math:`n r` columns of the :math:`B_i` in order meet the rows of the scaled
    :math:`A` sorted by rank first: it is the random pairing that differs from the formula, not the kind of update.

    Args:
        rank: Rank :math:`r` of one basis; a smaller one means more bases and more parameters.
        alpha: Scale of the update; the authors take 20 times the rank.
        bases: Entries of :math:`A` and :math:`B_i`: ``"dense"``: uniform; ``"sparse"``: -1, 0, 1 with probabilities 1/6,
            2/3, 1/6; ``"very_sparse"``: the same with :math:`1/(2\sqrt d)` in place of 1/6, :math:`d` the shorter side. All
            are divided by their standard deviation.
        dropout: Probability of dropping an input feature of the update in training.
        seed: Seed of the bases; they are made again from it when a file is loaded.

    Parameters per site:
        ``lambda`` (rank, n), zeros; ``gamma`` (n, min(d_out, d_in)), one over the larger of its two sizes. Shared and frozen:
        ``A`` (rank, 1, d) and ``B`` (D, n, rank) with the largest of the sites' shorter sides d and longer sides D.

    References:
        Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", ICLR 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(8, 12), RandLoRA(rank=3), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(3, 3), (3, 8)]
    """

    key = "randlora"
    paper = "RandLoRA: Full-rank parameter-efficient fine-tuning of large models"
    equation = r"W' = W + \tfrac{\alpha}{r} \sum_i B_i \Lambda_i A\, \Gamma_i"
    golden = "PEFT"
    full_precision = True

    rank: int = 32
    alpha: float = 640.0
    bases: Literal["dense", "sparse", "very_sparse"] = "dense"
    dropout: float = 0.0
    seed: int = 0

    def check(self, site: Site) -> None:
        check_rank(self, site)

    def shared(self, sites: Sequence[Site]) -> Tensors:
        # one rectangle that holds every site, as PEFT has it: its sides are the largest output and the largest input
        short, long = sorted(max(sizes) for sizes in zip(*(s.shape for s in sites), strict=True))
        a, b = self._basis("A", (self.rank, 1, short), short), self._basis("B", (long, -(-short // self.rank), self.rank), short)
        return {"A": frozen(a, saved=False), "B": frozen(b, saved=False)}

    def _basis(self, name: str, shape: tuple[int, ...], short: int) -> Tensor:
        uniform = torch.rand(shape, generator=seeded(self.seed, "randlora", name))
        if self.bases == "dense":
            drawn = 2 * uniform - 1
        else:
            chance = 1 / (2 * (3 if self.bases == "sparse" else short**0.5))
            drawn = (uniform > 1 - chance).float() - (uniform < chance).float()
        return drawn / drawn.std()

    def init(self, site: Site) -> Tensors:
        short = min(site.shape)
        n = -(-short // self.rank)
        return {"lambda": torch.zeros(self.rank, n), "gamma": torch.full((n, short), 1 / max(n, short))}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._factors(p, w.shape[0], w.shape[1])
        return plus_product(w, b, a, self.alpha / self.rank)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        d_out, d_in = base.shape
        a, b = self._factors(p, d_out, d_in)
        if base.kind in ("linear", "conv1d_hf") and not self.dropout:
            rows, r = x.numel() // d_in, a.shape[0]
            if rows * (r * (d_out + d_in) - d_out * d_in) > r * d_out * d_in:  # the bases are wide: for many rows the update is cheaper formed
                update = self.alpha / self.rank * b @ a
                return base(x) + base.apply(update.to(x.dtype), x)
        dropped = F.dropout(x, self.dropout, base.training) if self.dropout and x.is_floating_point() else None
        return base.low_rank(x, a, b, self.alpha / self.rank, dropped)

    def needs_forward(self) -> bool:
        return self.dropout > 0

    def _factors(self, p: Tensors, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
        """The update as one product of (d_out, n rank) and (n rank, d_in)."""
        n, short = p["gamma"].shape
        scaled = _Scaled.apply(p["lambda"], p["A"][..., :short], p["gamma"]).flatten(0, 1)  # type: ignore[no-untyped-call]
        fixed = p["B"][: max(d_out, d_in), :n].flatten(1)
        return (scaled, fixed) if short == d_in else (fixed.T, scaled.T)


class _Scaled(torch.autograd.Function):
    """``lambda_ij A_i gamma_j`` (rank, n, d) from ``lambda`` (rank, n), the fixed ``A`` (rank, 1, d) and ``gamma`` (n, d); none of that size is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(size: Tensor, A: Tensor, gamma: Tensor) -> Tensor:
        return A * gamma * size[:, :, None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        size, A, gamma = ctx.saved_tensors
        along = dy * A
        return torch.einsum("ijd,jd->ij", along, gamma), None, torch.einsum("ijd,ij->jd", along, size)
