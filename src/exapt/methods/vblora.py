"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (Li et al., NeurIPS 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_divides
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class VBLoRA(WeightMethod):
    r"""LoRA whose factors are put together from one bank of vectors: :math:`W' = W + B A`.

    Each row of :math:`A` and each column of :math:`B` is cut into pieces of length :math:`b`; a piece is a mixture
    :math:`\sum_{k \in K} \sigma_k v_k` of the :math:`K` bank vectors with the largest logits, :math:`\sigma` their softmax.
    All sites share the bank. After training only the indices and weights of the :math:`K` vectors of a piece count.

    Args:
        rank: Rank of the update.
        num_vectors: Number :math:`h` of vectors in the bank.
        vector_length: Their length :math:`b`; it must divide the features of every site.
        topk: Number :math:`K` of vectors in a mixture.
        dropout: Probability of dropping an input feature of the update in training.
        bound: The bank starts uniform in (-bound, bound).
        logits_std: Standard deviation of the logits at the start.

    Parameters per site:
        ``logits_A`` (rank, d_in / b, h) and ``logits_B`` (d_out / b, rank, h), normal. Shared: ``bank`` (h, b), uniform.

    References:
        Li, Han, Ji, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", NeurIPS 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(8, 4), VBLoRA(rank=2, num_vectors=10, vector_length=4), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(10, 4), (2, 2, 10), (1, 2, 10)]
    """

    key = "vblora"
    paper = "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks"
    equation = r"W' = W + B A,\quad A_{i,j:j+b} = \sum_{k \in \mathrm{top}_K} \sigma_k v_k"
    golden = "PEFT"
    full_precision = True
    exceptions: ClassVar = {"identity": "neither factor may start at zero, for both come from the same bank; the start is a small random update"}

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    dropout: float = 0.0
    bound: float = 0.02
    logits_std: float = 0.1

    def check(self, site: Site) -> None:
        check_divides(self, site, "vector_length", site.shape[0], "output features")
        check_divides(self, site, "vector_length", site.shape[1], "input features")
        if self.rank < 1 or not 1 <= self.topk <= self.num_vectors:
            raise InputError(f"{self.key}: rank={self.rank} and topk={self.topk} must be at least 1, topk at most num_vectors={self.num_vectors}")
        if not self.bound >= 0:
            raise InputError(f"{self.key}.bound is {self.bound}; it must not be negative")

    def shared(self, sites: Sequence[Site]) -> Tensors:
        return {"bank": torch.empty(self.num_vectors, self.vector_length).uniform_(-self.bound, self.bound)}

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        a = torch.randn(self.rank, d_in // self.vector_length, self.num_vectors)
        b = torch.randn(d_out // self.vector_length, self.rank, self.num_vectors)
        return {"logits_A": self.logits_std * a, "logits_B": self.logits_std * b}

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
        a, b = self._mixtures(p["logits_A"], p["bank"]), self._mixtures(p["logits_B"], p["bank"])
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def _mixtures(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Vectors (..., b) from logits (..., h)."""
        largest, index = logits.topk(self.topk, -1)
        return (largest.softmax(-1)[..., None] * F.embedding(index, bank)).sum(-2)
