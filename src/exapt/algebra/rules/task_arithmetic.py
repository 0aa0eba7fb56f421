"""Task arithmetic: sums of task vectors (Ilharco et al., ICLR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from exapt.algebra.rule import rule


@rule("task_arithmetic", paper="Editing Models with Task Arithmetic", oracle="mergekit", entrywise=True)
def summed(deltas: Tensor, weights: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    r"""Weighted sum of task vectors, :math:`\lambda \sum_i w_i \tau_i`; a negative weight takes a task away.

    Args:
        deltas: Task vectors (m, ...).
        weights: (m,); by default 1 each.
        scale: The factor :math:`\lambda`.

    Returns:
        (...).

    References:
        Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023.

    >>> summed(torch.tensor([[1.0], [4.0]]), torch.tensor([1.0, -0.5]))
    tensor([-1.])
    """
    w = deltas.new_ones(len(deltas)) if weights is None else weights
    return scale * torch.tensordot(w, deltas, 1)
