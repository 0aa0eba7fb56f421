"""TSV-M: the leading singular vectors of every task, made orthogonal to those of the others (Gargiulo et al., CVPR 2025)."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from exapt.algebra.rule import rule


@rule("tsv", paper="Task Singular Vectors: Reducing Task Interference in Model Merging")
def singular_vectors_merged(deltas: Tensor, weights: Tensor | None = None, name: str = "", *, scale: float = 1.0, exclude: str = "") -> Tensor:
    r"""Concatenated truncated decompositions with orthogonal vectors, :math:`\lambda\, U_\perp\, \mathrm{diag}(S)\, V_\perp^\top`.

    Every matrix :math:`\tau_i` gives its :math:`k = \max(1, \lfloor \min(d_{out}, d_{in}) / m \rfloor)` leading singular triplets;
    :math:`U = [U_1 \dots U_m]`, and V likewise, is replaced by the nearest matrix with orthonormal columns. What is no matrix is averaged.
    As the official code, but that k is at least 1 there 0, and directions that U or V lacks (of equal task vectors) stay out.

    Args:
        deltas: Task vectors (m, ...).
        weights: (m,), factors of the task vectors; by default 1 each.
        name: The tensor's.
        scale: The factor :math:`\lambda`.
        exclude: Expression for names of matrices that are averaged, too (the official code: ``text_projection``).

    Returns:
        (...).

    References:
        Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025.

    >>> singular_vectors_merged(torch.stack([torch.diag(torch.tensor([2.0, 0.5])), torch.diag(torch.tensor([0.1, 3.0]))]))
    tensor([[2., 0.],
            [0., 3.]])
    """
    deltas = weighted(deltas, weights)
    if averaged_only(deltas, name, exclude):
        return scale * deltas.mean(0)
    k = max(1, min(deltas.shape[1:]) // len(deltas))
    u, s, v = torch.linalg.svd(deltas, full_matrices=False)
    left, right = u[:, :, :k].movedim(0, 1).flatten(1), v[:, :k].flatten(0, 1).mT
    return scale * (orthogonalised(left) * s[:, :k].flatten()) @ orthogonalised(right).mT


def orthogonalised(columns: Tensor) -> Tensor:
    r"""The nearest matrix with orthonormal columns, :math:`M (M^\top M)^{-1/2}`, within the columns' span where they depend on one another."""
    u, s, v = torch.linalg.svd(columns, full_matrices=False)
    there = s > s.max() * torch.finfo(s.dtype).eps * max(columns.shape)
    return u[:, there] @ v[there]


def averaged_only(deltas: Tensor, name: str, exclude: str) -> bool:
    """Whether a tensor is no matrix, or one that the expression names."""
    return deltas.dim() != 3 or bool(exclude and re.search(exclude, name))


def weighted(deltas: Tensor, weights: Tensor | None) -> Tensor:
    """Task vectors times their factors."""
    return deltas if weights is None else deltas * weights.reshape(-1, *[1] * (deltas.dim() - 1))
