"""WiSE-FT: interpolation of the weights before and after fine-tuning (Wortsman et al., CVPR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.core.errors import InputError


@rule("interpolate", paper="Robust fine-tuning of zero-shot models", entrywise=True)
def interpolated(models: Tensor, base: Tensor, *, alpha: float = 0.5) -> Tensor:
    r"""Goes part of the way from the base to a model: :math:`(1 - \alpha)\, \theta_0 + \alpha\, \theta`; 0 and 1 are exactly the base and the model.

    Args:
        models: One model (1, ...).
        base: (...).
        alpha: The share :math:`\alpha`; below 0 or above 1 it extrapolates.

    Returns:
        (...).

    Raises:
        InputError: for another number of models.

    References:
        Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.

    >>> interpolated(torch.ones(1, 2), torch.zeros(2), alpha=0.25)
    tensor([0.2500, 0.2500])
    """
    if len(models) != 1:
        raise InputError(f"interpolate goes from the base to one model, and got {len(models)}; task_arithmetic and average take several")
    return torch.lerp(base, models[0], alpha)
