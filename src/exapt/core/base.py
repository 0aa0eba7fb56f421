"""What a weight method's fast path sees of the frozen layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from exapt.core.layers import dense, is_quantised
from exapt.core.products import LinearLowRank, LinearPlus, LinearScaled, LinearSparse, LowRank

if TYPE_CHECKING:
    from exapt.core.entry import Entry
    from exapt.core.slots import Slots


class Base:
    """The layer below a method: frozen, quantised or not, with the methods attached before it already in effect.

    ``base(x)`` runs it. ``base.apply(M, x)`` is its operation with matrix ``M`` (m, d_in) in place of ``W`` and no bias
    (product, convolution with its stride, padding and dilation, look-up). ``base.out(M, h)`` multiplies the feature axis by
    ``M`` (d_out, m).
    """

    __slots__ = ("entries", "module", "rest", "slots")

    def __init__(self, module: Any, slots: Slots, entries: tuple[Entry, ...], rest: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.module, self.slots, self.entries, self.rest = module, slots, entries, rest

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = self.rest
        if not self.entries:
            return self.slots.frozen_forward(self.module, x, *args, **kwargs)
        return self.entries[-1].forward(x, Base(self.module, self.slots, self.entries[:-1], self.rest))

    def apply(self, matrix: Tensor, x: Tensor) -> Tensor:
        """The layer's operation with ``matrix`` (m, d_in) and no bias."""
        return self.slots.layer.apply(self.module, x, matrix, *self.rest[0], **self.rest[1])

    def out(self, matrix: Tensor, h: Tensor) -> Tensor:
        """Multiplies the feature axis of ``h`` by ``matrix`` (d_out, m)."""
        return self.slots.layer.out(matrix, h)

    def scale(self, v: Tensor, h: Tensor) -> Tensor:
        """Multiplies the feature axis of ``h`` (an input or an output) by the vector ``v``."""
        return self.slots.layer.scale(v, h)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, low_rank_x: Tensor | None = None, biased: bool = True) -> Tensor:
        """Returns ``base(x) + scale * B (A x)``, keeping as little as possible for backward.

        Args:
            x: Input of the layer.
            A: (r, d_in).
            B: (d_out, r).
            scale: Factor.
            low_rank_x: Input of the low-rank part where it differs (dropout).
            biased: Whether the layer's bias is in it.
        """
        if low_rank_x is None and self._plain_linear(x):
            W, bias = self.module._parameters["weight"], self.module._parameters["bias"] if biased else None
            if torch.is_grad_enabled():
                return LinearLowRank.apply(x, W, bias, A, B, scale)  # type: ignore[no-untyped-call]
            return LinearLowRank.forward(None, x, cast(Tensor, W), bias, A, B, scale)
        y = self(x)
        bias = None if biased else self.bias
        if bias is not None:
            y = y - self.scale(bias.to(y.dtype), y.new_ones(()))
        inner = x if low_rank_x is None else low_rank_x
        if self.slots.layer.kind in ("linear", "conv1d_hf") and y.is_contiguous():
            return LowRank.apply(y, inner.to(y.dtype), A, B, scale)  # type: ignore[no-untyped-call]
        return self.slots.layer.plus(y, B.to(y.dtype), self.apply(A.to(y.dtype), inner), scale)

    def plus(self, x: Tensor, h: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Returns ``base(x) + scale * (B h)`` for a small ``h`` that the method made itself.

        Args:
            x: Input of the layer.
            h: What ``base.apply`` gives with a matrix of ``m`` rows: (..., m) on a linear layer.
            B: (d_out, m).
            scale: A number, or a vector (d_out,) over the features.
        """
        if not self._plain_linear(x):
            return self.added(self(x), h, B, scale)
        W, bias = cast(Tensor, self.module._parameters["weight"]), self.module._parameters["bias"]
        if isinstance(scale, Tensor):
            given = x, W, bias, self.out(B.to(h.dtype), h), scale
            return LinearScaled.apply(*given) if torch.is_grad_enabled() else LinearScaled.forward(None, *given)  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled():
            return LinearPlus.apply(x, W, bias, h, B, scale)  # type: ignore[no-untyped-call]
        return LinearPlus.forward(None, x, W, bias, h, B, scale)

    def added(self, y: Tensor, h: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Returns ``y + scale * (B h)`` in the type of ``y``, for a ``y`` that the method made itself; see :meth:`plus`."""
        if isinstance(scale, Tensor):
            return y + self.scale(scale.to(y.dtype), self.out(B.to(y.dtype), h.to(y.dtype)))
        return self.slots.layer.plus(y, B.to(y.dtype), h.to(y.dtype), scale)

    def sparse(self, x: Tensor, values: Tensor, index: Tensor, scale: float = 1.0, seen: Callable[[Tensor], None] | None = None) -> Tensor:
        """Runs the layer with ``scale * values`` added to the matrix at the flat places ``index``, keeping no changed matrix for backward.

        Args:
            x: Input of the layer.
            values: (k,).
            index: (k,), into the flattened matrix.
            scale: Factor.
            seen: Called in backward with the gradient of the whole matrix, flattened.
        """
        if self._plain_linear(x):
            W, bias = self.module._parameters["weight"], self.module._parameters["bias"]
            return LinearSparse.apply(x, W, bias, values, index, scale, seen)  # type: ignore[no-untyped-call]
        w = self.weight
        matrix = torch.zeros_like(w).flatten().index_add(0, index, values.to(w.dtype), alpha=scale).view(w.shape)
        if seen is not None and matrix.requires_grad and not torch.compiler.is_compiling():
            matrix.register_hook(lambda gradient: seen(gradient.flatten()))  # type: ignore[no-untyped-call]
        return self(x) + self.apply(matrix, x)

    def _plain_linear(self, x: Tensor) -> bool:
        """Whether what lies below is ``nn.Linear``'s own product with frozen, ordinary parameters of the type of ``x``."""
        slots, W, bias = self.slots, self.module._parameters.get("weight"), self.module._parameters.get("bias")
        return (
            slots.base_class.forward is nn.Linear.forward
            and not (self.entries or slots.chain.overrides)
            and type(W) is nn.Parameter
            and W.dtype == x.dtype
            and not W.requires_grad
            and "bias" in self.module._parameters
            and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
            and not torch.is_autocast_enabled(x.device.type)
            and not torch._C._are_functorch_transforms_active()  # these need LowRank's vmap rule, which nothing in place can have
        )

    @property
    def weight(self) -> Tensor:
        """The matrix ``W`` (d_out, d_in) below this method, dequantised if need be."""
        return self.slots.matrix(self.module, self.entries)

    @property
    def bias(self) -> Tensor | None:
        """The bias below this method."""
        return self.slots.bias(self.module, self.entries)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the matrix."""
        return self.slots.layer.shape

    @property
    def kind(self) -> str:
        """Kind of layer: linear, conv1d_hf, embedding, conv, conv_transposed."""
        return self.slots.layer.kind

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return bool(self.module.training)


def plain(weight: Tensor) -> Tensor:
    """The stored weight, dequantised if it is quantised."""
    return dense(weight) if is_quantised(weight) else weight
