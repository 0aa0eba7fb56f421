"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., ICLR 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class VeRA(WeightMethod):
    r"""Scales two frozen random matrices that all sites share: :math:`W' = W + \Lambda_b B \Lambda_d A`.

    Args:
        rank: Rank of the update; it costs few parameters, so it is larger than LoRA's.
        d_initial: Start of every entry of :math:`\Lambda_d`.
        seed: Seed of ``A`` and ``B``; they are made again from it when a file is loaded.

    Parameters per site:
        ``lambda_d`` (rank,) and ``lambda_b`` (d_out,), zeros. Shared and frozen: ``A`` (rank, largest d_in) and ``B``
        (largest d_out, rank), Kaiming uniform; a site uses their first columns and rows.

    References:
        Kopiczko, Blankevoort, Asano, "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), VeRA(rank=5), where="all")
    >>> exapt.parameter_count(model).trainable
    8
    """

    key = "vera"
    paper = "VeRA: Vector-based Random Matrix Adaptation"
    equation = r"W' = W + \mathrm{diag}(\lambda_b)\, B\, \mathrm{diag}(\lambda_d)\, A"
    golden = "PEFT"
    full_precision = True

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0

    def check(self, site: Site) -> None:
        if self.rank < 1:
            raise InputError(f"{site.name or '(model)'}: vera.rank is {self.rank}; it must be at least 1")

    def shared(self, sites: Sequence[Site]) -> Tensors:
        d_out, d_in = (max(sizes) for sizes in zip(*(s.shape for s in sites), strict=True))
        return {"A": self._kaiming("A", self.rank, d_in), "B": self._kaiming("B", d_out, self.rank)}

    def _kaiming(self, name: str, rows: int, columns: int) -> Tensor:
        uniform = torch.rand(rows, columns, generator=seeded(self.seed, "vera", name))
        return frozen((2 * uniform - 1) * (6 / columns) ** 0.5, saved=False)

    def init(self, site: Site) -> Tensors:
        d_out, _ = site.shape
        return {"lambda_d": torch.full((self.rank,), self.d_initial), "lambda_b": torch.zeros(d_out)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        d_out, d_in = w.shape
        left = p["lambda_b"][:, None] * p["B"][:d_out] * p["lambda_d"]
        return plus_product(w, left, p["A"][:, :d_in])

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["A"][:, : shape[1]], p["lambda_b"][:, None] * p["B"][: shape[0]] * p["lambda_d"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        d_out, d_in = base.shape
        dtype = x.dtype if x.is_floating_point() else p["lambda_b"].dtype
        A, B = p["A"][:, :d_in].to(dtype), p["B"][:d_out]
        # base.low_rank would form gradients of the large frozen matrices; only the vectors need any
        return base.plus(x, base.scale(p["lambda_d"].to(dtype), base.apply(A, x)), B, p["lambda_b"])
