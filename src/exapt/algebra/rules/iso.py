"""Isotropic merging: a merged task matrix with one singular value for all directions (Marczak et al., ICML 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.rules.tsv import averaged_only, orthogonalised, weighted
from exapt.core.errors import InputError


@rule("iso_c", paper="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces")
def isotropic(deltas: Tensor, weights: Tensor | None = None, name: str = "", *, scale: float = 1.0, exclude: str = "") -> Tensor:
    r"""Iso-C: the sum of task matrices with its spectrum made flat, :math:`\lambda \bar\sigma\, U V^\top` with :math:`\sum_i \tau_i = U \Sigma V^\top`.

    :math:`\bar\sigma` is the mean singular value. What is no matrix is averaged, as in the official code, which chooses :math:`\lambda` on validation data.

    Args:
        deltas: Task vectors (m, ...).
        weights: (m,), factors of the task vectors; by default 1 each.
        name: The tensor's.
        scale: The factor :math:`\lambda`.
        exclude: Expression for names of matrices that are averaged, too (the official code: ``text_projection``).

    Returns:
        (...).

    References:
        Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML 2025.

    >>> isotropic(torch.diag(torch.tensor([3.0, 1.0]))[None])
    tensor([[2., 0.],
            [0., 2.]])
    """
    deltas = weighted(deltas, weights)
    if averaged_only(deltas, name, exclude):
        return scale * deltas.mean(0)
    u, s, v = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    return scale * s.mean() * (u @ v)


@rule("iso_cts", paper="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces")
def isotropic_with_specifics(
    deltas: Tensor, weights: Tensor | None = None, name: str = "", *, common: float = 0.8, scale: float = 1.0, exclude: str = ""
) -> Tensor:
    r"""Iso-CTS: the leading directions of the sum, then each task's own directions outside of them, all with one singular value.

    Of :math:`r = \min(d_{out}, d_{in})` directions, about ``common`` r are the sum's; the rest is shared out equally: task i gives the leading
    singular vectors of :math:`(I - U_c U_c^\top)\,\tau_i`. All left and all right vectors are made orthonormal, and every singular value is
    the mean of those chosen. What is no matrix is averaged.

    Args:
        deltas: Task vectors (m, ...).
        weights: (m,), factors of the task vectors; by default 1 each.
        name: The tensor's.
        common: Share of the common directions, from 0 to 1.
        scale: The factor :math:`\lambda`.
        exclude: Expression for names of matrices that are averaged, too (the official code: ``text_projection``).

    Returns:
        (...).

    Raises:
        InputError: for a share that is not in [0, 1].

    References:
        Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML 2025.

    >>> isotropic_with_specifics(torch.diag(torch.tensor([3.0, 1.0]))[None], common=1.0)
    tensor([[2., 0.],
            [0., 2.]])
    """
    if not 0 <= common <= 1:
        raise InputError(f"iso_cts: common {common} is not between 0 and 1")
    deltas = weighted(deltas, weights)
    if averaged_only(deltas, name, exclude):
        return scale * deltas.mean(0)
    r, m = min(deltas.shape[1:]), len(deltas)
    own = min(round((r - int(r * common)) / m), r // m)  # directions of each task
    first = r - own * m
    u, s, v = (t[..., :first] if t.dim() == 1 else t for t in torch.linalg.svd(deltas.sum(0), full_matrices=False))
    left, values, right = [u[:, :first]], [s], [v[:first]]
    for delta in deltas if own else []:
        u_i, s_i, v_i = torch.linalg.svd(delta - left[0] @ (left[0].mT @ delta), full_matrices=False)
        left, values, right = [*left, u_i[:, :own]], [*values, s_i[:own]], [*right, v_i[:own]]
    return scale * torch.cat(values).mean() * orthogonalised(torch.cat(left, 1)) @ orthogonalised(torch.cat(right).mT).mT
