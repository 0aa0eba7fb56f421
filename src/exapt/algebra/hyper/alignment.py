"""Embeddings of a new modality that start where those of text lie, by a Gromov-Wasserstein coupling (Dutt et al., 2025)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exapt.core.components import component
from exapt.core.errors import InputError

Array = NDArray[np.float64]


def entropic_coupling(a: Array, b: Array, *, epsilon: float = 0.05, rounds: int = 100, inner: int = 50) -> Array:
    r"""Couples two sets by their inner distances alone: :math:`\min_T \sum_{ijkl} (a_{ik} - b_{jl})^2\, T_{ij} T_{kl}`, marginals uniform.

    Proximal steps: each solves the problem linearised at the coupling before, with the Kullback-Leibler divergence from it weighted by ``epsilon``
    times the cost's mean, by Sinkhorn's algorithm. It starts from the sets' distance profiles (the sorted rows of distances),
    which tells symmetric solutions apart that the uniform coupling would not leave.

    Args:
        a: Distances (n, n).
        b: Distances (m, m).
        epsilon: Size of the proximal term.
        rounds: Proximal steps.
        inner: Sinkhorn iterations in each.

    Returns:
        The coupling (n, m): its columns add up to 1 / m, its rows to 1 / n as nearly as the iterations came.

    References:
        Xu, Luo, Zha and Carin, "Gromov-Wasserstein Learning for Graph Matching and Node Embedding", ICML 2019.
    """
    n, m = len(a), len(b)
    profile = np.linspace(0, 1, min(n, m))
    rows, columns = (np.stack([np.quantile(r, profile) for r in d]) for d in (a, b))
    log_t = _sinkhorn(-((rows[:, None] - columns) ** 2).mean(-1) / (epsilon * (a.var() + b.var() + 1e-12)), inner)
    constant = (a**2).mean(1)[:, None] + (b**2).mean(1)[None]
    for _ in range(rounds):
        cost = constant - 2 * a @ np.exp(log_t) @ b
        new = _sinkhorn(log_t - cost / (epsilon * (np.abs(cost).mean() + 1e-12)), inner)
        done = np.abs(np.exp(new) - np.exp(log_t)).max() < 1e-9 / (n * m)
        log_t = new
        if done:
            break
    return np.exp(_sinkhorn(log_t, 20 * inner))


def _sinkhorn(log_k: Array, rounds: int) -> Array:
    """Scales a kernel, given by its logarithm, to uniform marginals."""
    n, m = log_k.shape
    u, v = np.zeros(n), np.zeros(m)
    for _ in range(rounds):
        before = u
        u = -np.log(n) - np.logaddexp.reduce(log_k + v, axis=1)
        v = -np.log(m) - np.logaddexp.reduce(log_k + u[:, None], axis=0)
        if np.abs(u - before).max() < 1e-10:
            break
    out: Array = log_k + u[:, None] + v
    return out


@component(
    "aligned_start",
    kind="upcycling",
    paper="Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities",
    oracle="NumPy; isometries, whose matching is known",
)
def aligned_start(new: Tensor, text: Tensor, *, epsilon: float = 0.05) -> Tensor:
    r"""Where embeddings of a new modality's tokens start among those of text: :math:`e_i = n \sum_j T_{ij}\, w_j`.

    :math:`T` couples the new tokens (an image tokenizer's codebook, say) with text tokens so that distances within the one agree
    with distances within the other (Gromov-Wasserstein); the spaces need not have anything to do with each other. The paper's exact scheme could not be
    read; this is its description.

    Args:
        new: The new tokens in a space of their own (n, d_n).
        text: Text embeddings of the model (m, d), a few thousand at most.
        epsilon: Of :func:`entropic_coupling`; smaller is sharper.

    Returns:
        (n, d).

    Raises:
        InputError: for other shapes, or values that are not finite.

    References:
        Dutt, Hanspal, Xia, Tudosiu, Black, Yang, McDonagh and Parisot, "Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative
        Abilities", 2025.

    >>> text = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    >>> aligned_start(torch.tensor([[30.0], [0.0]]) @ torch.ones(1, 2), text).shape
    torch.Size([2, 2])
    """
    if new.dim() != 2 or text.dim() != 2 or min(len(new), len(text)) < 2:
        raise InputError(f"aligned_start: new {tuple(new.shape)} and text {tuple(text.shape)} must be two or more vectors each")
    if not bool(torch.isfinite(new).all() and torch.isfinite(text).all()):
        raise InputError("aligned_start: the embeddings hold NaN or infinity")
    distances = [torch.cdist(t.double(), t.double()) for t in (new, text)]
    a, b = ((d / d.mean().clamp_min(1e-12)).cpu().numpy() for d in distances)
    coupling = torch.tensor(entropic_coupling(a, b, epsilon=epsilon), dtype=torch.double, device=text.device)
    shares = coupling / coupling.sum(1, keepdim=True)
    return (shares @ text.double()).to(text.dtype)
