"""Averages of models: the uniform soup, and weighted."""

from __future__ import annotations

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.core.errors import InputError


@rule(
    "average",
    paper="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
    oracle="mergekit",
    entrywise=True,
)
def averaged(models: Tensor, weights: Tensor | None = None, *, normalise: bool = True) -> Tensor:
    r"""Weighted mean :math:`\sum_i w_i \theta_i / \sum_i w_i`, by default the uniform soup.

    Args:
        models: (m, ...).
        weights: (m,); by default 1 each.
        normalise: Whether the weights are divided by their sum.

    Returns:
        (...).

    Raises:
        InputError: for weights that add up to zero where they are normalised.

    References:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time", ICML 2022.

    >>> averaged(torch.tensor([[1.0], [4.0]]), torch.tensor([2.0, 1.0]))
    tensor([2.])
    """
    w = models.new_ones(len(models)) if weights is None else weights
    if normalise:
        total = w.sum()
        if float(total.abs()) < 1e-12:
            raise InputError(f"average: the weights {w.tolist()} add up to zero, and cannot be normalised; pass normalise=False or others")
        w = w / total
    return torch.tensordot(w, models, 1)
