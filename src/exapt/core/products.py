"""The autograd functions of layers with frozen weights: what they keep for the backward pass, and where their sums are made in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRank(torch.autograd.Function):
    r"""Computes :math:`y + s\, B (A x)` keeping only ``x`` for the backward pass.

    The intermediate :math:`A x` is made again in backward (rank times one column of work), and the product is added to
    ``y`` in the same call that computes it, so that no tensor of the output's size is held twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        h = x.reshape(-1, x.shape[-1]) @ A.to(x.dtype).T
        return torch.addmm(y.reshape(-1, y.shape[-1]), h, B.to(x.dtype).T, alpha=scale).view(y.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, A, B, ctx.scale = inputs
        ctx.save_for_backward(x, A, B)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        a, b = A.to(x.dtype), B.to(x.dtype)
        flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dh = (flat_dy @ b) * ctx.scale
        dx = (dh @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        da = (dh.T @ flat_x).to(A.dtype) if ctx.needs_input_grad[2] else None
        db = _outer(flat_x @ a.T, flat_dy, ctx.scale).to(B.dtype) if ctx.needs_input_grad[3] else None
        return dy, dx, da, db, None


class LinearLowRank(torch.autograd.Function):
    r"""Computes :math:`W x + b + s\, B (A x)` for frozen :math:`W` and :math:`b`, keeping only ``x`` for the backward pass.

    The update is added onto the layer's own fresh output, and in backward onto its own fresh gradient of ``x``: neither is
    copied, and no second gradient of ``x`` waits to be summed. That is worth a third of what the update costs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        if ctx is not None:  # with setup_context every call would look up the signature, which costs more than a small layer
            ctx.scale = scale
            ctx.save_for_backward(x, W, A, B)
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, W, bias).addmm_(flat @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        a, b = A.to(x.dtype), B.to(x.dtype)
        flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dh = flat_dy @ b
        dx = (flat_dy @ W).addmm_(dh, a, alpha=ctx.scale).view(x.shape) if ctx.needs_input_grad[0] else None
        da = ((dh.T @ flat_x) * ctx.scale).to(A.dtype) if ctx.needs_input_grad[3] else None
        db = _outer(flat_x @ a.T, flat_dy, ctx.scale).to(B.dtype) if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None


class LinearPlus(torch.autograd.Function):
    r"""Computes :math:`W x + b + s\, B h` for frozen :math:`W` and :math:`b` and a number :math:`s`, keeping nothing of ``x`` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, scale: float) -> Tensor:
        y = F.linear(x.reshape(-1, x.shape[-1]), W, bias).addmm_(h.reshape(-1, h.shape[-1]), B.to(h.dtype).T, alpha=scale)
        if ctx is not None:
            ctx.scale, ctx.shape, ctx.dtype, needed = scale, h.shape, B.dtype, ctx.needs_input_grad
            ctx.save_for_backward(W if needed[0] else None, h if needed[4] else None, B if needed[3] else None)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        W, h, B = ctx.saved_tensors
        flat, dh, db = dy.reshape(-1, dy.shape[-1]), None, None
        dx = (flat @ W).view(*dy.shape[:-1], W.shape[1]) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[3]:
            dh = (flat @ B.to(dy.dtype)).view(ctx.shape)
            dh = dh if ctx.scale == 1 else dh * ctx.scale
        if ctx.needs_input_grad[4]:
            db = _outer(h.reshape(-1, h.shape[-1]), flat, ctx.scale).to(ctx.dtype)
        return dx, None, None, dh, db, None


class LinearScaled(torch.autograd.Function):
    r"""Computes :math:`W x + b + s \odot u` for frozen :math:`W` and :math:`b` and a vector :math:`s`, keeping nothing of ``x`` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, update: Tensor, scale: Tensor) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(W, update if ctx.needs_input_grad[4] else None, scale)
        return F.linear(x, W, bias).addcmul_(update, scale.to(update.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        W, update, scale = ctx.saved_tensors
        dx = dy @ W if ctx.needs_input_grad[0] else None
        du = dy * scale.to(dy.dtype) if ctx.needs_input_grad[3] else None
        ds = (dy * update).reshape(-1, dy.shape[-1]).sum(0).to(scale.dtype) if ctx.needs_input_grad[4] else None
        return dx, None, None, du, ds


class LinearSparse(torch.autograd.Function):
    r"""Computes :math:`(W + S) x + b` for a sparse :math:`S`, keeping ``x`` and the entries of ``S`` for the backward pass but not
    :math:`W + S`, which is made again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, scale: float, seen: Any) -> Tensor:
        ctx.scale, ctx.seen = scale, seen
        ctx.save_for_backward(x, W, values, index)
        return F.linear(x, _with_entries(W, values, index, scale), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, values, index = ctx.saved_tensors
        dx = dy @ _with_entries(W, values, index, ctx.scale) if ctx.needs_input_grad[0] else None
        dw = (dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])).flatten()
        if ctx.seen is not None:
            ctx.seen(dw)
        return dx, None, None, (dw[index] * ctx.scale).to(values.dtype), None, None, None


def _with_entries(W: Tensor, values: Tensor, index: Tensor, scale: float) -> Tensor:
    return W.flatten().index_add(0, index, values.to(W.dtype), alpha=scale).view(W.shape)


def _outer(h: Tensor, dy: Tensor, scale: float) -> Tensor:
    """``scale * dy^T h``, (d_out, r), as the transpose of a product with long rows, which is twice as fast."""
    return ((h.T @ dy) * scale).T


def plus_product(w: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``W + s L R`` in one pass over the matrix: computed in the wider of the types, returned in that of ``w``.

    >>> plus_product(torch.eye(2), torch.ones(2, 1), torch.ones(1, 2), 0.5)
    tensor([[1.5000, 0.5000],
            [0.5000, 1.5000]])
    """
    kind = torch.promote_types(w.dtype, left.dtype)
    return torch.addmm(w.to(kind), left.to(kind), right.to(kind), alpha=scale).to(w.dtype)
