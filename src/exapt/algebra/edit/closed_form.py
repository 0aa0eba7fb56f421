"""The closed forms of locate-and-edit methods: updates of one matrix from keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from exapt.core.errors import InputError


def rank_one(residual: Tensor, key: Tensor, c: Tensor, mean_key: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    r"""ROME: :math:`\Delta = \frac{r\,(C^{-1}\bar k)^\top}{(C^{-1}\bar k)^\top k}`, the least change of what the layer does to its usual keys,
    :math:`\mathrm{tr}(\Delta C \Delta^\top)`, under which :math:`\Delta k = r`.

    Args:
        residual: :math:`r = v_* - Wk` (d_out,).
        key: :math:`k` (d_in,), where the new value holds exactly.
        c: :math:`C` (d_in, d_in), positive definite.
        mean_key: :math:`\bar k` (d_in,), the key averaged over contexts; by default the key. Minimal only where it is the key.
        factor: Lower Cholesky factor of C, where it is known: it serves all edits.

    Returns:
        (d_out, d_in).

    >>> rank_one(torch.tensor([2.0]), torch.tensor([1.0, 1.0]), torch.diag(torch.tensor([1.0, 3.0])))
    tensor([[1.5000, 0.5000]])
    """
    towards = key if mean_key is None else mean_key
    direction = torch.linalg.solve(c, towards) if factor is None else torch.cholesky_solve(towards[:, None], factor)[:, 0]
    return torch.outer(residual, direction / (direction @ key))


def least_squares(residuals: Tensor, keys: Tensor, c: Tensor, factor: Tensor | None = None) -> Tensor:
    r"""MEMIT: :math:`\Delta = R K^\top (C_0 + K K^\top)^{-1}`, the solution of the normal equations of
    :math:`\|\Delta K - R\|^2 + \mathrm{tr}(\Delta C_0 \Delta^\top)`; a few edits come nearly true, old keys keep their values nearly.

    Args:
        residuals: :math:`R` (n, d_out), one edit a row.
        keys: :math:`K` (n, d_in), one edit a row.
        c: :math:`C_0 = \lambda E[kk^\top]` (d_in, d_in).
        factor: Lower Cholesky factor of :math:`C_0`, where it is known; then the system that is solved is (n, n).

    Returns:
        (d_out, d_in).

    >>> least_squares(torch.tensor([[4.0]]), torch.tensor([[1.0]]), torch.ones(1, 1))
    tensor([[2.]])
    """
    if factor is None:
        return torch.linalg.solve(c + keys.T @ keys, keys.T @ residuals).T
    whitened = torch.cholesky_solve(keys.T, factor)
    system = torch.eye(len(keys), dtype=keys.dtype, device=keys.device) + keys @ whitened
    return (whitened @ torch.linalg.solve(system, residuals)).T


def regularised(keys: Tensor, values: Tensor, penalty: Tensor) -> Tensor:
    r"""UltraEdit and MALMEN: :math:`\Delta^\top = (K^\top K + \lambda I)^{-1} K^\top V`, by the smaller of two systems, for it is also
    :math:`K^\top (K K^\top + \lambda I)^{-1} V`: one edit at a time is a division.

    Args:
        keys: :math:`K` (n, d_in), one edit a row.
        values: :math:`V` (n, d_out).
        penalty: :math:`\lambda` (), positive.

    Returns:
        (d_out, d_in).

    >>> regularised(torch.tensor([[1.0, 2.0]]), torch.tensor([[6.0]]), torch.tensor(1.0))
    tensor([[1., 2.]])
    """
    n, d = keys.shape
    eye = penalty * torch.eye(min(n, d), dtype=keys.dtype, device=keys.device)
    if n < d:
        return torch.linalg.solve(keys @ keys.T + eye, values).T @ keys
    return torch.linalg.solve(keys.T @ keys + eye, keys.T @ values).T


def null_space(c: Tensor, threshold: float) -> Tensor:
    r"""Basis :math:`\hat U` of what :math:`C = E[kk^\top]` hardly uses; the paper's projector is :math:`P = \hat U \hat U^\top`.

    Args:
        c: :math:`C` (d_in, d_in).
        threshold: Eigenvalues below this share of their mean count as none. The official code takes an absolute number (0.02), which depends on the
            scale of the keys.

    Returns:
        (d_in, r), orthonormal.

    Raises:
        InputError: if nothing is left.

    >>> null_space(torch.diag(torch.tensor([1.0, 0.0])), 0.01)
    tensor([[0.],
            [1.]])
    """
    values, vectors = torch.linalg.eigh(c)
    kept = vectors[:, values < threshold * values.mean()]
    if not kept.shape[1]:
        raise InputError(f"no direction of the keys lies below the threshold {threshold} of their mean eigenvalue; raise it")
    return kept


def projected(residuals: Tensor, keys: Tensor, basis: Tensor, past: Tensor, ridge: float = 1.0) -> Tensor:
    r"""AlphaEdit: :math:`\Delta = R K^\top P (K_p K_p^\top P + K K^\top P + \beta I)^{-1}`, which changes no key :math:`k` with :math:`Pk = 0`.

    With :math:`P = \hat U \hat U^\top` that is :math:`R A^\top (A_p A_p^\top + A A^\top + \beta I)^{-1} \hat U^\top`, where :math:`A = \hat U^\top K`: a
    symmetric system as large as the null space.

    Args:
        residuals: :math:`R` (n, d_out).
        keys: :math:`K` (n, d_in).
        basis: :math:`\hat U` (d_in, r), of :func:`null_space`.
        past: :math:`A_p A_p^\top` (r, r) of the edits before.
        ridge: :math:`\beta`, 1 in the paper.

    Returns:
        (d_out, d_in), the whole shift :math:`\Delta P` of the paper.

    >>> projected(torch.tensor([[2.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0], [1.0]]), torch.zeros(1, 1))
    tensor([[0., 1.]])
    """
    free = keys @ basis
    system = past + free.T @ free + ridge * torch.eye(len(past), dtype=keys.dtype, device=keys.device)
    return (basis @ torch.linalg.solve(system, free.T @ residuals)).T
