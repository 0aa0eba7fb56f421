"""LoKr: Kronecker products (KronA, Edalati et al., 2022; LyCORIS, Yeh et al., ICLR 2024)."""

from dataclasses import dataclass
from math import isqrt, prod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class LoKr(WeightMethod):
    r"""Adds a Kronecker product, of full rank where its factors are: :math:`W' = W + s\, w_1 \otimes w_2` with :math:`s = \alpha / r`.

    Both dimensions are split into two factors, :math:`d_{out} = a b` and :math:`d_{in} = c d`; :math:`w_1` is (a, c) and
    :math:`w_2` (b, d), which is itself a product of rank :math:`r` where :math:`r < \max(b, d) / 2`. The fast path reads the
    input as a matrix (c, d): :math:`(w_1 \otimes w_2)\, x` is :math:`w_1 X w_2^\top`, two small products.

    Args:
        rank: Rank :math:`r` of :math:`w_2` where it is decomposed.
        alpha: Scale of the update.
        decompose_both: Whether :math:`w_1` is a product of rank :math:`r` too, where :math:`r < \max(a, c) / 2`.
        decompose_factor: First factor of both dimensions; where it does not divide one, the largest divisor below it and
            below the square root is taken. -1: the largest divisor up to the square root.
        use_effective_conv2d: For convolutions with a kernel of more than one element, a decomposed :math:`w_2` is a Tucker
            product that shares the kernel's elements (as in :class:`LoHa`).
        start_at: Which of the two starts at zero: ``"w1"``, as in PEFT, or ``"w2"``, as in LyCORIS.

    Parameters per site:
        ``w1`` (a, c), zeros; or ``w1_a`` (a, rank), zeros, and ``w1_b`` (rank, c). ``w2`` (b, d k), Kaiming uniform, for a kernel of k
        elements; or ``w2_a`` (b, rank), ``w2_b`` (rank, d k); or ``w2_a`` (rank, b), ``w2_b`` (rank, d), ``t2`` (rank, rank, \*kernel).

    References:
        Edalati, Tahaei, Kobyzev, Nia, Clark, Rezagholizadeh, "KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022.
        Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(64, 36), LoKr(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(6, 8), (6, 2), (2, 8)]
    """

    key = "lokr"
    paper = "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
    equation = r"W' = W + s\, w_1 \otimes w_2"
    golden = "PEFT"
    variants: ClassVar = {"KronA: Parameter Efficient Tuning with Kronecker Adapter": "LoKr(rank=r, alpha=r * s) with r at least half of every factor"}
    full_precision = True
    fast_kinds = ("linear", "conv1d_hf")

    rank: int = 8
    alpha: float = 8.0
    decompose_both: bool = False
    decompose_factor: int = -1
    use_effective_conv2d: bool = False
    start_at: Literal["w1", "w2"] = "w1"

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        check_rank(self, site, most=prod(site.shape))
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise InputError(f"{site.name or '(model)'}: lokr.decompose_factor is {self.decompose_factor}; it must be -1 or at least 1")

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), r = site.shape, self.rank
        kernel = site.layer.stored[2:] if site.layer is not None and site.layer.kind in ("conv", "conv_transposed") else ()
        k = prod(kernel)
        (a, b), (c, d) = (_split(size, self.decompose_factor) for size in (d_out, d_in // k))
        shapes: dict[str, tuple[int, ...]] = {"w1_a": (a, r), "w1_b": (r, c)} if self.decompose_both and r < max(a, c) / 2 else {"w1": (a, c)}
        if r >= max(b, d) / 2:
            shapes |= {"w2": (b, d * k)}
        elif self.use_effective_conv2d and k > 1:
            shapes |= {"w2_a": (r, b), "w2_b": (r, d), "t2": (r, r, *kernel)}
        else:
            shapes |= {"w2_a": (b, r), "w2_b": (r, d * k)}
        p = {name: nn.init.kaiming_uniform_(torch.empty(shape, device=site.device), a=5**0.5) for name, shape in shapes.items()}
        zero = self.start_at if self.start_at in p else {"w1": "w1_a", "w2": "w2_b"}[self.start_at]
        return {**p, zero: torch.zeros_like(p[zero])}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        left, right = _left(p), _right(p)
        (a, c), (b, d) = left.shape, right.shape
        return torch.addcmul(w.reshape(a, b, c, d), left[:, None, :, None], right[None, :, None, :], value=self.factor).reshape(w.shape).to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        w1 = (self.factor * _left(p)).to(y.dtype)
        p = {k: t.to(y.dtype) for k, t in p.items()}
        h = x.to(y.dtype).unflatten(-1, (w1.shape[1], -1))
        if "w2" in p:
            (a, c), (b, d) = w1.shape, p["w2"].shape
            first = a * d * (c + b) <= c * b * (d + a)
            return y + (_last(p["w2"], _across(w1, h)) if first else _across(w1, _last(p["w2"], h))).flatten(-2)
        return y + _last(p["w2_a"], _across(w1, _last(p["w2_b"], h))).flatten(-2)


def _last(matrix: Tensor, h: Tensor) -> Tensor:
    """``matrix`` (b, d) times the last dimension of ``h`` (..., c, d)."""
    return (h.reshape(-1, h.shape[-1]) @ matrix.T).view(*h.shape[:-1], -1)


def _across(matrix: Tensor, h: Tensor) -> Tensor:
    """``matrix`` (a, c) times the last but one dimension of ``h`` (..., c, d)."""
    return _last(matrix, h.mT).mT


def _left(p: Tensors) -> Tensor:
    return p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]


def _right(p: Tensors) -> Tensor:
    if "w2" in p:
        return p["w2"]
    if "t2" in p:
        return torch.einsum("ij...,ip,jq->pq...", p["t2"], p["w2_a"], p["w2_b"]).flatten(1)
    return p["w2_a"] @ p["w2_b"]


def _split(size: int, factor: int) -> tuple[int, int]:
    """``size`` as a product of two; see ``decompose_factor``."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = isqrt(size) if factor < 0 else min(factor, isqrt(size))
    first = next(n for n in range(limit, 0, -1) if size % n == 0)
    return first, size // first
