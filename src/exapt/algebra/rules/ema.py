"""Progressive averages: models in the order in which they were learned, each merged into what was before."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sparsify import check_choice
from exapt.core.errors import InputError

Before = Literal["last", "mean"]


@rule(
    "ema",
    variants={
        "A Unified Continual Learning Framework with General Parameter-Efficient Tuning": "its offline module: decay=0.9999",
        "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning": 'its adapter merging: before="mean", decay=0.1',
    },
    entrywise=True,
)
def ema_merged(models: Tensor, *, decay: float = 0.9, before: Before = "last") -> Tensor:
    r"""Merges models one after the other, :math:`\bar\theta_i = a\, \theta_{<i} + (1 - a)\, \theta_i`; so their order matters.

    LAE's :math:`\theta_{<i}` is the last result :math:`\bar\theta_{i-1}` (an exponential moving average), MOS's the mean of all results before.
    Both apply the step during training, too; this is the step.

    Args:
        models: (m, ...), the oldest first.
        decay: The weight :math:`a` of what was before.
        before: ``"last"`` or ``"mean"``.

    Returns:
        (...).

    Raises:
        InputError: for a decay out of [0, 1].

    References:
        Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning", ICCV 2023. Sun et al., "MOS: Model Surgery for
        Pre-Trained Model-Based Class-Incremental Learning", AAAI 2025.

    >>> ema_merged(torch.tensor([[0.0], [1.0], [2.0]]), decay=0.5)
    tensor([1.2500])
    """
    check_choice("before", before, Before)
    if not 0 <= decay <= 1:
        raise InputError(f"ema: decay={decay} must be from 0 to 1")
    old = new = models[0]
    for i, theta in enumerate(models[1:], 2):
        new = torch.lerp(theta, old, decay)
        old = new if before == "last" else torch.lerp(old, new, 1 / i)
    return new
