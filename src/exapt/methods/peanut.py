"""PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers (Zhong et al., 2024)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
}


@register
@dataclass(frozen=True)
class PEANuT(WeightMethod):
    r"""Adds what a small network makes of the matrix: :math:`W' = W + s B f(A W)`, :math:`f` acting on each column.

    :math:`f` is the activation :math:`\sigma`, followed by ``depth`` layers :math:`h \mapsto \sigma(E_k h)` and as many
    :math:`h \mapsto \sigma(D_k h) + h_k`, each with the input :math:`h_k` of its counterpart added, the last one's first. The fast path
    uses that the update has rank :math:`r` at most: it costs :math:`f(A W)` once for a call and LoRA's two products.

    Args:
        rank: Width :math:`r` of the network.
        depth: Number of layers :math:`E_k`, and of :math:`D_k`.
        act_fn: The activation :math:`\sigma`.
        scaling: Scale :math:`s` of the update.

    Parameters per site:
        ``A`` (rank, d_out), Kaiming uniform; ``B`` (d_out, rank), zeros; with ``depth`` also ``E`` and ``D`` (depth, rank, rank),
        Kaiming uniform.

    References:
        Zhong, Jiang, Li, Nakada, Liu, Zhang, Yao and Wang, "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural
        Tweakers", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(6, 4), PEANuT(rank=2, depth=1), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 4), (4, 2), (1, 2, 2), (1, 2, 2)]
    """

    key = "peanut"
    paper = "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers"
    equation = r"W' = W + s B\, \sigma(A W)"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    rank: int = 32
    depth: int = 0
    act_fn: Literal["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"] = "relu"
    scaling: float = 1.0

    def check(self, site: Site) -> None:
        if self.rank < 1:
            raise InputError(f"{site.name or '(model)'}: peanut.rank is {self.rank}; it must be at least 1")
        if self.depth < 0:
            raise InputError(f"{site.name or '(model)'}: peanut.depth is {self.depth}; it must be 0 or more")

    def init(self, site: Site) -> Tensors:
        d_out, r = site.shape[0], self.rank

        def kaiming(*shape: int) -> Tensor:  # uniform, slope sqrt(5)
            return torch.empty(shape, device=site.device).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5)

        tensors = {"A": kaiming(r, d_out), "B": torch.zeros(d_out, r, device=site.device)}
        if self.depth:
            tensors |= {"E": kaiming(self.depth, r, r), "D": kaiming(self.depth, r, r)}
        return tensors

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["B"], self._network(p, w), self.scaling)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, self._network(p, base.weight), p["B"], self.scaling)

    def _network(self, p: Tensors, w: Tensor) -> Tensor:
        """``f(A W)`` (rank, d_in)."""
        activation = ACTIVATIONS[self.act_fn]
        h = activation(p["A"] @ w.to(p["A"].dtype))
        skipped = []
        for k in range(self.depth):
            skipped.append(h)
            h = activation(p["E"][k] @ h)
        for k in range(self.depth):
            h = activation(p["D"][k] @ h) + skipped.pop()
        return h
