"""Multi-SLERP: barycentric interpolation of any number of models on a sphere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.streamed import Parts, gram, in_parts, spanned
from exapt.core.errors import InputError


def _streamed(parts: Parts, weights: Tensor | None = None, *, normalise: bool, eps: float) -> Iterator[Tensor]:
    if len(parts) == 1:
        yield from (part[0] for part in parts)
    else:
        yield from spanned(parts, _coefficients(gram(parts, origin=True), weights, normalise, eps), origin=True)


@rule("multislerp", oracle="mergekit", streamed=_streamed)
def multislerped(models: Tensor, weights: Tensor | None = None, base: Tensor | None = None, *, normalise: bool = True, eps: float = 1e-8) -> Tensor:
    r"""Averages directions in the tangent space at their weighted mean and goes back to the sphere; the norm is the weighted mean of norms.

    .. math:: u_i = \frac{\theta_i}{\lVert \theta_i \rVert}, \quad
        \mu = \frac{\sum_i w_i u_i}{\lVert \sum_i w_i u_i \rVert}, \quad
        v = \sum_i w_i \big(u_i - \langle u_i, \mu \rangle \mu\big), \quad
        \theta = \Big(\sum_i w_i \lVert \theta_i \rVert\Big) \Big(\cos\lVert v \rVert\, \mu + \sin\lVert v \rVert \frac{v}{\lVert v \rVert}\Big)

    Each tensor is one vector. Two opposite models of equal weight are averaged linearly.

    Args:
        models: (m, ...).
        weights: (m,); by default 1 each.
        base: (...); origin of the sphere, by default zero.
        normalise: Whether the weights are divided by their sum.
        eps: Added to norms.

    Returns:
        (...).

    Raises:
        InputError: for more than two models whose directions cancel out, or weights that add up to zero where they are normalised.

    References:
        Goddard, "Multi-SLERP", 2025 (goddard.blog/posts/multislerp-wow-what-a-cool-idea).

    >>> multislerped(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    tensor([1.4142, 1.4142])
    """
    if len(models) == 1:
        return models[0]
    rows = models if base is None else models - base
    merged = torch.tensordot(_coefficients(gram(in_parts(rows)), weights, normalise, eps).to(models), rows, 1)
    return merged if base is None else base + merged


def _coefficients(products: Tensor, weights: Tensor | None, normalise: bool, eps: float) -> Tensor:
    """The models' coefficients in the result, which lies in their span (m,), from their inner products (m, m)."""
    w = products.new_ones(len(products)) if weights is None else weights.to(products)
    if normalise:
        if float(w.sum().abs()) < 1e-8:
            raise InputError(f"multislerp: the weights {w.tolist()} add up to zero, and cannot be normalised; pass normalise=False or others")
        w = w / w.sum()
    norms = products.diagonal().sqrt()
    scale = 1 / (norms + eps)
    cosines = scale[:, None] * products * scale

    def length(c: Tensor) -> float:
        return math.sqrt(max(float(c @ cosines @ c), 0.0))

    if length(w) < max(eps, 1e-7):  # which is as near to zero as the models' precision tells
        if len(w) > 2 and bool(norms.any()):  # tensors that did not move are no contradiction
            raise InputError("multislerp: the directions of the models cancel out under these weights; give others")
        return w
    mean = w / length(w)
    tangent = w - (w @ cosines @ mean) * mean
    angle = length(tangent) + eps
    return (w @ norms) * (math.cos(angle) * mean + math.sin(angle) / angle * tangent) * scale
