"""Low-rank task vectors that stay low-rank: sums, norms, angles and truncation from the factors, never from the dense matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.contract import WeightMethod
from exapt.core.errors import InputError


@component("low_rank", kind="low-rank", oracle="NumPy: the same on dense matrices")
@dataclass(frozen=True, eq=False)
class LowRank:
    r"""A matrix :math:`\Delta = B A` held by its factors, any scale folded in.

    Decompositions are of an (r, r) matrix, by QR of both factors, in double precision; results come back in the factors' dtype.

    Args:
        B: (d_out, r), floating point.
        A: (r, d_in), of the same dtype and device.

    Raises:
        InputError: for shapes, dtypes or devices that do not go together.

    >>> one = LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0, 4.0]]))
    >>> one.shape, one.rank, one.norm()
    ((2, 2), 1, 5.0)
    >>> (one - 0.5 * one).dense()
    tensor([[1.5000, 2.0000],
            [0.0000, 0.0000]])
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        b, a = self.B, self.A
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise InputError(f"LowRank: B {tuple(b.shape)} and A {tuple(a.shape)} are no factors; give (d_out, r) and (r, d_in)")
        if not b.is_floating_point() or b.dtype != a.dtype or b.device != a.device:
            raise InputError(f"LowRank: B is {b.dtype} on {b.device}, A {a.dtype} on {a.device}; give one floating-point type on one device")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of ``B``: an upper bound of the matrix's rank."""
        return self.B.shape[1]

    def dense(self) -> Tensor:
        """The matrix (d_out, d_in)."""
        return self.B @ self.A

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(factor * self.B, self.A)

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return -1.0 * self

    def __add__(self, other: LowRank) -> LowRank:
        return concatenated([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        return concatenated([self, other], [1.0, -1.0])

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Thin decomposition :math:`\Delta = U \mathrm{diag}(s) V^\top` in double precision.

        Returns:
            ``U`` (d_out, k), ``s`` (k,), descending, and ``V`` transposed (k, d_in), k = min(r, d_out, d_in).

        Raises:
            InputError: for NaN or infinity in a factor.
        """
        left, inner, right = self._reduced()
        u, s, vh = torch.linalg.svd(inner, full_matrices=False)
        return left @ u, s, vh @ right.mT

    def compressed(self, rank: int | None = None, error: float | None = None) -> tuple[LowRank, float]:
        r"""The best approximation of lower rank (Eckart-Young), and what it costs.

        Args:
            rank: Largest rank.
            error: Or the largest relative error: the smallest rank that keeps it is taken.

        Returns:
            The approximation, its factors sharing the singular values evenly, and its relative Frobenius error
            :math:`\|\Delta - \Delta_r\|_F / \|\Delta\|_F = (\sum_{i > r} s_i^2 / \sum_i s_i^2)^{1/2}` (0 for a zero matrix); rounding the
            factors to their dtype is not part of it.

        Raises:
            InputError: unless one of ``rank`` (at least 1) and ``error`` (not negative) is given; for NaN or infinity in a factor.

        >>> both = LowRank(torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2))
        >>> best, cost = both.compressed(rank=1)
        >>> best.rank, round(cost, 6)
        (1, 0.6)
        """
        if (rank is None) == (error is None) or (rank is not None and rank < 1) or (error is not None and not error >= 0):
            raise InputError(f"compressed: rank is {rank}, error is {error}; give one of them, a rank from 1 or an error from 0")
        u, s, vh = self.svd()
        squares = s.square()
        lost = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])  # lost[k]: what rank k leaves out, summed smallest first
        relative = (lost / lost[0].clamp_min(torch.finfo(lost.dtype).tiny)).sqrt()
        k = min(rank, len(s)) if rank is not None else max(1, int((relative > (error or 0.0)).sum()))
        root = s[:k].sqrt()
        made = LowRank((u[:, :k] * root).to(self.B.dtype), (root[:, None] * vh[:k]).to(self.B.dtype))
        return made, float(relative[k])

    def inner(self, other: LowRank) -> float:
        r"""The Frobenius inner product :math:`\langle B A, B' A' \rangle = \langle B^\top B', A A'^\top \rangle`."""
        _same([self, other], "inner")
        b, a = self.B.double().mT @ other.B.double(), self.A.double() @ other.A.double().mT
        return float((b * a).sum())

    def norm(self) -> float:
        """The Frobenius norm."""
        return float(torch.linalg.matrix_norm(self._reduced()[1]))

    def angle(self, other: LowRank) -> float:
        r"""The angle between two matrices, in radians from 0 to :math:`\pi`; NaN where one of them is zero.

        By :math:`2\,\mathrm{atan2}(\|u - v\|, \|u + v\|)` of the unit vectors, which is exact for small angles too.
        """
        _same([self, other], "angle")
        mine, theirs = self.norm(), other.norm()
        if mine == 0 or theirs == 0:
            return math.nan
        u, v = LowRank(self.B.double() / mine, self.A.double()), LowRank(other.B.double() / theirs, other.A.double())
        return 2 * math.atan2((u - v).norm(), (u + v).norm())

    def _reduced(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal ``P`` and ``Q``, and the small matrix ``C`` with ``B A = P C Q.T``."""
        for name, factor in (("B", self.B), ("A", self.A)):
            if not bool(torch.isfinite(factor).all()):
                raise InputError(f"LowRank: {name} holds NaN or infinity")
        p, left = torch.linalg.qr(self.B.double())
        q, right = torch.linalg.qr(self.A.double().mT)
        return p, left @ right.mT, q


@component("concatenated", kind="low-rank", oracle="NumPy: the weighted sum of dense matrices")
def concatenated(terms: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    r"""The exact weighted sum of low-rank matrices of any ranks: :math:`\sum_i w_i B_i A_i = [w_1 B_1, \dots]\,[A_1; \dots]`.

    Args:
        terms: Matrices of one shape and dtype.
        weights: One for each; by default 1.

    Returns:
        A matrix whose rank is the sum of the terms'; :meth:`LowRank.compressed` brings it down.

    Raises:
        InputError: for no term, another number of weights, or terms of several shapes or dtypes.

    >>> one = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    >>> two = concatenated([one, one], [1.0, 2.0])
    >>> two.rank, two.dense()[0].tolist()
    (2, [3.0, 3.0, 3.0])
    """
    _same(terms, "concatenated")
    w = weighed(terms, weights, "concatenated")
    return LowRank(torch.cat([c * t.B for c, t in zip(w, terms, strict=True)], 1), torch.cat([t.A for t in terms]))


def factors_of(method: WeightMethod, p: Mapping[str, Tensor], shape: tuple[int, int]) -> LowRank | None:
    """A method's shift of a matrix of some shape by its factors, where it says that a low-rank product is all that it adds.

    >>> import exapt
    >>> factors_of(exapt.LoRA(rank=1, alpha=3.0), {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}, (2, 2)).dense()[0].tolist()
    [3.0, 3.0]
    """
    found = method.low_rank(dict(p), shape)
    return None if found is None else LowRank(found[1], found[0])


def weighed(terms: Sequence[LowRank], weights: Sequence[float] | None, name: str) -> list[float]:
    """The weights, one for each term, by default 1."""
    w = [1.0] * len(terms) if weights is None else [float(x) for x in weights]
    if len(w) != len(terms) or not all(math.isfinite(x) for x in w):
        raise InputError(f"{name}: {len(w)} weights {w} for {len(terms)} low-rank matrices; give one finite number for each")
    return w


def _same(terms: Sequence[LowRank], name: str) -> None:
    """Refuses matrices that cannot be added."""
    if not terms:
        raise InputError(f"{name}: there is no low-rank matrix")
    for i, t in enumerate(terms):
        if t.shape != terms[0].shape:
            raise InputError(f"{name}: matrix {i} is {t.shape[0]}x{t.shape[1]}, the first {terms[0].shape[0]}x{terms[0].shape[1]}")
        if t.B.dtype != terms[0].B.dtype:
            raise InputError(f"{name}: matrix {i} is {t.B.dtype}, the first {terms[0].B.dtype}; convert them to one type first")
