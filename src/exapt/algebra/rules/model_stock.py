"""Model Stock: how far to go from the base to the average, told from the angle between models (Jang et al., ECCV 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sphere import lengths, rows_of
from exapt.core.errors import InputError


@rule("model_stock", paper="Model Stock: All we need is just a few fine-tuned models", oracle="mergekit")
def model_stock_merged(deltas: Tensor, *, filter_wise: bool = False) -> Tensor:
    r"""Goes the share :math:`t` of the way to the average, more the better the task vectors agree.

    .. math:: \tau = t\, \frac{1}{m} \sum_i \tau_i, \qquad t = \frac{m \cos\theta}{1 + (m - 1) \cos\theta}

    with the mean cosine of all pairs; where it makes the denominator zero, the base stays.

    Args:
        deltas: Task vectors (m, ...).
        filter_wise: Whether every row has an angle of its own (along the last dimension), or every tensor.

    Returns:
        (...).

    Raises:
        InputError: for fewer than two models.

    References:
        Jang, Yun and Han, "Model Stock: All we need is just a few fine-tuned models", ECCV 2024.

    >>> model_stock_merged(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([0.8284, 0.4142])
    """
    m = len(deltas)
    if m < 2:
        raise InputError(f"model_stock needs at least 2 models for an angle, and got {m}")
    rows = deltas if filter_wise and deltas.ndim > 1 else rows_of(deltas)
    norms = lengths(rows)
    # All pairs at once: the square of a sum of unit vectors is their number plus twice the cosines.
    cosine = ((rows / norms.clamp(min=torch.finfo(rows.dtype).tiny)).sum(0).square().sum(-1, keepdim=True) - (norms > 0).sum(0)) / (m * (m - 1))
    below = 1 + (m - 1) * cosine
    t = torch.where(below.abs() < 1e-6, 0.0, m * cosine / below)
    return (t * rows.mean(0)).reshape(deltas.shape[1:])
