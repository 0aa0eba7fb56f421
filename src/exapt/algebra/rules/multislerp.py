"""Multi-SLERP: barycentric interpolation of any number of models on a sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sphere import inner, lengths, rows_of, units
from exapt.core.errors import InputError


@rule("multislerp", oracle="mergekit")
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
    w = models.new_ones(len(models)) if weights is None else weights
    if normalise:
        if float(w.sum().abs()) < 1e-8:
            raise InputError(f"multislerp: the weights {w.tolist()} add up to zero, and cannot be normalised; pass normalise=False or others")
        w = w / w.sum()
    rows = rows_of(models if base is None else models - base)
    norms = lengths(rows)[:, 0]
    u = rows / (norms[:, None] + eps)
    mean = w @ u
    if float(lengths(mean)) < eps:
        if len(models) > 2 and bool(norms.any()):  # tensors that did not move are no contradiction
            raise InputError("multislerp: the directions of the models cancel out under these weights; give others")
        merged = w @ rows
    else:
        mean = units(mean)
        tangent = w @ (u - inner(u, mean) * mean)
        angle = lengths(tangent) + eps
        merged = (w @ norms) * (torch.cos(angle) * mean + torch.sin(angle) / angle * tangent)
    merged = merged.reshape(models.shape[1:])
    return merged if base is None else base + merged
