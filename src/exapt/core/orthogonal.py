"""Orthogonal matrices from unconstrained numbers, and block-diagonal rotations by them, for methods that rotate."""

from math import isqrt
from typing import Any

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
    # (I - Q)(I + Q)^-1 = 2 (I + Q)^-1 - I; all singular values of I + Q are at least 1, and its inverse's gradient is two products
    return 2 * torch.linalg.inv(one + q) - one


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """``x`` (..., n b) times the block-diagonal matrix of ``blocks`` (n, b, b) from the right."""
    n, b, _ = blocks.shape
    parts = x.reshape(-1, n, b)
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        turned: Tensor = torch.einsum("ank,nkc->anc", parts, blocks)
    else:
        turned = _Rotated.apply(parts, blocks)  # type: ignore[no-untyped-call]
    return turned.reshape(x.shape)


class _Rotated(torch.autograd.Function):
    """``x`` (a, n, b) times ``blocks`` (n, b, b), written straight into its place: einsum copies what goes in and what comes out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(x, blocks)
        return _product(x, blocks)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks = ctx.saved_tensors
        dx = _Rotated.apply(dy, blocks.mT) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
        return dx, torch.bmm(x.permute(1, 2, 0), dy.transpose(0, 1)) if ctx.needs_input_grad[1] else None


def _product(x: Tensor, blocks: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    torch.bmm(x.transpose(0, 1), blocks, out=out.transpose(0, 1))
    return out
