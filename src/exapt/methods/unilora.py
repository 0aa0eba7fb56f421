"""Uni-LoRA: One Vector is All You Need (Li et al., NeurIPS 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class UniLoRA(WeightMethod):
    r"""LoRA for all sites out of one vector: :math:`W' = W + B A`, :math:`(A, B)_{all} = P\, \theta_d`.

    Every row of :math:`P` has one entry, in a random column, and the columns are scaled to length 1; so :math:`P` is an
    isometry, costs no multiplication by a matrix, and each entry of every :math:`A` and :math:`B` is one entry of
    :math:`\theta_d` over the square root of how often that one is used. The columns are drawn independently, as in the
    paper; PEFT deals them out evenly.

    Args:
        rank: Rank of the updates.
        theta_d_length: Length :math:`d` of the vector.
        dropout: Probability of dropping an input feature of the update in training.
        bound: The vector starts uniform in (-bound, bound).
        seed: Seed of :math:`P`; it is made again from it when a file is loaded.

    Parameters per site:
        None. Shared: ``theta_d`` (d,), uniform. Frozen, made again from the seed: ``index_A`` (rank, d_in), ``index_B``
        (d_out, rank) and, shared, ``scale`` (d,).

    References:
        Li, Han, Su, Li, Cai, Ji, "Uni-LoRA: One Vector is All You Need", NeurIPS 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)), UniLoRA(theta_d_length=20), where="all")
    >>> exapt.parameter_count(model).trainable
    20
    """

    key = "unilora"
    paper = "Uni-LoRA: One Vector is All You Need"
    equation = r"W' = W + B A,\quad \mathrm{vec}(A_1, B_1, A_2, \dots) = P\, \theta_d"
    golden = "PEFT"
    full_precision = True
    exceptions: ClassVar = {"identity": "neither factor may start at zero, for both come from the same vector; the start is a small random update"}

    rank: int = 4
    theta_d_length: int = 256
    dropout: float = 0.0
    bound: float = 0.02
    seed: int = 42

    def check(self, site: Site) -> None:
        if self.rank < 1 or self.theta_d_length < 1:
            raise InputError(f"{self.key}: rank={self.rank} and theta_d_length={self.theta_d_length} must be at least 1")
        if not self.bound >= 0:
            raise InputError(f"{self.key}.bound is {self.bound}; it must not be negative")

    def shared(self, sites: Sequence[Site]) -> Tensors:
        counts = torch.zeros(self.theta_d_length)
        for site in sites:
            experts = site.layer.stacked if site.layer else None
            for name in [site.name] if experts is None else [f"{site.name}.{e}" for e in range(experts)]:
                for index in self._columns(name, site.shape):
                    counts += index.flatten().bincount(minlength=self.theta_d_length)
        theta_d = torch.empty(self.theta_d_length).uniform_(-self.bound, self.bound)
        return {"theta_d": theta_d, "scale": frozen(counts.clamp(min=1).rsqrt(), saved=False)}

    def init(self, site: Site) -> Tensors:
        a, b = self._columns(site.name, site.shape)
        return {"index_A": frozen(a, saved=False), "index_B": frozen(b, saved=False)}

    def _columns(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Which entry of ``theta_d`` each entry of ``A`` and of ``B`` is."""
        generator = seeded(self.seed, "unilora", name)
        sizes = (self.rank, shape[1]), (shape[0], self.rank)
        a, b = (torch.randint(self.theta_d_length, size, generator=generator, dtype=torch.int32) for size in sizes)
        return a, b

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._factors(p)
        return plus_product(w, b, a)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self._factors(p)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        dropped = F.dropout(x, self.dropout, base.training) if self.dropout and x.is_floating_point() else None
        return base.low_rank(x, *self._factors(p), low_rank_x=dropped)

    def needs_forward(self) -> bool:
        return self.dropout > 0

    def _factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """``A`` (rank, d_in) and ``B`` (d_out, rank)."""
        vector = p["theta_d"] * p["scale"]
        a, b = (vector.index_select(0, p[k].flatten()).view(p[k].shape) for k in ("index_A", "index_B"))
        return a, b
