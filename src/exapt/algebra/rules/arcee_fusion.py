"""Arcee Fusion: take over the entries of a model that stand out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.core.errors import InputError


@rule("arcee_fusion", oracle="mergekit")
def arcee_fused(models: Tensor, base: Tensor) -> Tensor:
    r"""Takes over entries whose importance is at least the median plus 1.5 times the distance of the quartiles; the others stay the base's.

    .. math:: s = |\theta - \theta_0| \cdot \mathrm{KL}\big(\mathrm{softmax}(\theta)\,\Vert\,\mathrm{softmax}(\theta_0)\big)

    with the softmax over the last dimension. Quantiles are exact (mergekit estimates them from a million entries drawn at random if there are more).

    Args:
        models: One model (1, ...).
        base: (...).

    Returns:
        (...).

    Raises:
        InputError: for another number of models.

    References:
        Goddard et al., "Arcee's MergeKit: A Toolkit for Merging Large Language Models", EMNLP 2024 (its method ``arcee_fusion``; there is no paper).

    >>> arcee_fused(torch.tensor([[[0.1, 0.0, 0.0], [2.0, 5.0, 0.0]]]), torch.zeros(2, 3))
    tensor([[0., 0., 0.],
            [2., 5., 0.]])
    """
    if len(models) != 1:
        raise InputError(f"arcee_fusion merges one model into the base, and got {len(models)}")
    (model,) = models
    if not model.numel():
        return base.clone()
    eps = 1e-8
    p, q = F.softmax(model, -1) + eps, F.softmax(base, -1) + eps
    importance = (model - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    flat = importance.flatten()
    low, middle, high = (flat.kthvalue(int(share * (flat.numel() - 1)) + 1).values for share in (0.25, 0.5, 0.75))
    return torch.where(importance >= middle + 1.5 * (high - low), model, base)
