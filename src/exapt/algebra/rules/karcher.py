"""Karcher mean: the average of models on a sphere that is nearest to all of them along arcs (Wang et al., 2026)."""

from __future__ import annotations

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sphere import inner, lengths, rows_of, units
from exapt.core.errors import InputError


@rule("karcher", paper="Functionality-Oriented LLM Merging on the Fisher-Rao Manifold", oracle="mergekit")
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
    w = models.new_ones(len(models)) if weights is None else weights
    if bool((w < 0).any()) or not float(w.sum()) > 0:
        raise InputError(f"karcher: the weights {w.tolist()} must not be negative, and one must be positive")
    w = w / w.sum()
    rows = rows_of(models)
    norms = lengths(rows)[:, 0]
    here = norms > 0
    if len(models) == 1 or not bool((here & (w > 0)).any()):
        return models[0] if len(models) == 1 else torch.zeros_like(models[0])
    share = torch.where(here, w, 0.0) / w[here].sum()
    u = units(rows)
    mean = share @ u
    mean = u[int(here.nonzero()[0])] if float(lengths(mean)) < tol else units(mean)
    for _ in range(max_iter):
        cosines = inner(u, mean)[:, 0].clamp(-1, 1)
        angles = torch.acos(cosines)
        pulls = torch.where(torch.sin(angles) < tol, 0.0, share * angles / torch.sin(angles))
        step = pulls @ u - (pulls @ cosines) * mean
        size = lengths(step)
        if float(size) < tol:
            break
        mean = units(torch.cos(size) * mean + torch.sin(size) / size * step)
    return ((w @ norms) * mean).reshape(models.shape[1:])
