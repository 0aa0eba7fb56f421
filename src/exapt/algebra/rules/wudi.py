"""WUDI-Merging: a merged task vector that interferes less with every task's own (Cheng et al., ICML 2025)."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.rules.tsv import weighted
from exapt.core.errors import InputError


@rule("wudi", paper="Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors")
def interference_minimised(deltas: Tensor, weights: Tensor | None = None, name: str = "", *, steps: int = 300, lr: float = 1e-5, exclude: str = "") -> Tensor:
    r"""Steps of Adam down :math:`\sum_i \|(\tau - \tau_i)\,\tau_i^\top\|_F^2 / \|\tau_i\|_F^2`, from the sum of the task vectors on.

    A linear layer's task vector spans about its inputs' space, so this is how far each task's inputs feel the others. The few small steps are
    part of the method: the minimum itself lies far away wherever the task vectors have small singular values. What is no matrix is averaged.
    Followed: the paper's loss with the settings of fusion_bench.

    Args:
        deltas: Task vectors (m, ...).
        weights: (m,), factors of the task vectors; by default 1 each.
        name: The tensor's.
        steps: Of Adam.
        lr: Of Adam, absolute: a step moves an entry by about this much, whatever the size of the task vectors.
        exclude: Expression for names of matrices that are averaged, too.

    Returns:
        (...).

    Raises:
        InputError: for negative steps, or a rate that is not positive.

    References:
        Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors", ICML 2025.

    >>> interference_minimised(torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]]))  # inputs of their own: nothing interferes
    tensor([[2., 3.]])
    """
    if steps < 0 or lr <= 0:
        raise InputError(f"wudi: steps {steps} must not be negative, lr {lr} must be positive")
    deltas = weighted(deltas, weights)
    if deltas.dim() != 3 or (exclude and re.search(exclude, name)):
        return deltas.mean(0)
    norms = deltas.flatten(1).square().sum(1)
    grams = (deltas.mT @ deltas)[norms > 0] / norms[norms > 0, None, None]  # a task that changed nothing has no say
    gram, pulled = grams.sum(0), (deltas[norms > 0] @ grams).sum(0)  # the loss is quadratic: its gradient needs no more
    merged = deltas.sum(0).requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=lr)
    for _ in range(steps):
        merged.grad = 2 * (merged.detach() @ gram - pulled)
        optimiser.step()
    return merged.detach()
