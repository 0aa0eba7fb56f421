"""Karcher mean: the average of models on a sphere that is nearest to all of them along arcs (Wang et al., 2026)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.streamed import Parts, gram, in_parts, spanned
from exapt.core.errors import InputError


def _streamed(parts: Parts, weights: Tensor | None = None, *, max_iter: int, tol: float) -> Iterator[Tensor]:
    yield from spanned(parts, _coefficients(gram(parts), weights, max_iter, tol))


@rule("karcher", paper="Functionality-Oriented LLM Merging on the Fisher-Rao Manifold", oracle="mergekit", streamed=_streamed)
def karcher_mean(models: Tensor, weights: Tensor | None = None, *, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    r"""Finds the direction of least weighted squared arc length to all models by fixed-point steps; its norm is the weighted mean of norms.

    .. math:: \mu \leftarrow \exp_\mu\Big(\sum_i w_i \log_\mu u_i\Big), \qquad u_i = \theta_i / \lVert \theta_i \rVert, \quad
        \log_\mu u = \frac{\omega}{\sin\omega} (u - \cos\omega\, \mu), \quad \cos\omega = \langle u, \mu \rangle

    Each tensor is one vector; one that is zero has a norm, but no direction. An opposite of the mean has no shortest arc and does not pull.

    Args:
        models: (m, ...).
        weights: (m,), not negative; by default 1 each. They are divided by their sum.
        max_iter: Steps at most.
        tol: Where a step is shorter than this, it is the last.

    Returns:
        (...).

    Raises:
        InputError: for a negative weight, or none that is positive.

    References:
        Wang, Ye and Yin, "Functionality-Oriented LLM Merging on the Fisher-Rao Manifold", 2026. Karcher, "Riemannian center of mass and mollifier
        smoothing", Communications on Pure and Applied Mathematics 1977.

    >>> karcher_mean(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    tensor([1.4142, 1.4142])
    """
    return torch.tensordot(_coefficients(gram(in_parts(models)), weights, max_iter, tol).to(models), models, 1)


def _coefficients(products: Tensor, weights: Tensor | None, max_iter: int, tol: float) -> Tensor:
    """The models' coefficients in the mean, which lies in their span (m,), from their inner products (m, m)."""
    w = products.new_ones(len(products)) if weights is None else weights.to(products)
    if bool((w < 0).any()) or not float(w.sum()) > 0:
        raise InputError(f"karcher: the weights {w.tolist()} must not be negative, and one must be positive")
    w = w / w.sum()
    norms = products.diagonal().sqrt()
    here = norms > 0
    if len(products) == 1 or not bool((here & (w > 0)).any()):
        return torch.ones_like(w) if len(products) == 1 else torch.zeros_like(w)
    scale = torch.where(here, 1 / norms, 0.0)
    cosines = scale[:, None] * products * scale
    share = torch.where(here, w, 0.0) / w[here].sum()
    length = _length(share, cosines)
    mean = share / length if length >= tol else torch.eye(len(w), dtype=w.dtype)[int(here.nonzero()[0])]
    for _ in range(max_iter):
        near = (cosines @ mean).clamp(-1, 1)
        angles = torch.acos(near)
        pulls = torch.where(torch.sin(angles) < tol, 0.0, share * angles / torch.sin(angles))
        step = pulls - (pulls @ near) * mean
        size = _length(step, cosines)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / _length(mean, cosines)
    return (w @ norms) * scale * mean


def _length(c: Tensor, cosines: Tensor) -> float:
    """Of a sum of unit vectors."""
    return math.sqrt(max(float(c @ cosines @ c), 0.0))
