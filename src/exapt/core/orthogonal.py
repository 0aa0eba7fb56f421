"""Orthogonal matrices from unconstrained numbers, and block-diagonal rotations by them, for methods that rotate."""

from math import isqrt

import torch
from torch import Tensor


def skew(vector: Tensor) -> Tensor:
    """Skew-symmetric matrices (..., b, b) from their entries above the diagonal (..., b (b - 1) / 2), row by row.

    >>> skew(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]
    """
    b = (1 + isqrt(1 + 8 * vector.shape[-1])) // 2
    row, column = torch.triu_indices(b, b, 1, device=vector.device)
    flat = vector.new_zeros(*vector.shape[:-1], b * b).index_copy(-1, row * b + column, vector)
    upper = flat.reshape(*vector.shape[:-1], b, b)
    return upper - upper.mT


def cayley(vector: Tensor) -> Tensor:
    r"""Rotations :math:`(I - Q)(I + Q)^{-1}` (..., b, b) of :func:`skew` matrices :math:`Q`; zeros give the identity.

    >>> cayley(torch.tensor([1.0])).round(decimals=6).tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    """
    q = skew(vector)
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    rotation: Tensor = torch.linalg.solve(one + q, one - q)  # the two commute
    return rotation


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """``x`` (..., n b) times the block-diagonal matrix of ``blocks`` (n, b, b) from the right."""
    n, b, _ = blocks.shape
    turned: Tensor = torch.einsum("...nk,nkc->...nc", x.reshape(*x.shape[:-1], n, b), blocks)
    return turned.flatten(-2)
