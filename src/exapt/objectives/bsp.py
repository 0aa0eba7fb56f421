"""BSP: batch spectral penalisation (Chen et al., ICML 2019)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.objective import Around, Objective, Step, task_loss


def spectral_penalty(h_s: Tensor, h_t: Tensor, k: int = 1) -> Tensor:
    r"""Squares of the largest singular values of both batches of features: :math:`\sum_{i \le k} \sigma_{s,i}^2 + \sigma_{t,i}^2`.

    Args:
        h_s: Source features (n, d).
        h_t: Target features (m, d).
        k: How many of each.

    Returns:
        A scalar.

    >>> float(spectral_penalty(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0]])))
    13.0
    """
    return sum((torch.linalg.svdvals(h)[:k].square().sum() for h in (h_s, h_t)), h_s.new_zeros(()))


@component("bsp", kind="objective", paper="Transferability vs. Discriminability: Batch Spectral Penalization for Adversarial Domain Adaptation")
@dataclass(frozen=True)
class BSP(Around):
    r"""Keeps the largest singular values of the features small, beside another objective.

    :math:`\mathcal{L} + \beta \sum_{i \le k} (\sigma_{s,i}^2 + \sigma_{t,i}^2)`.

    Args:
        inner: The objective :math:`\mathcal{L}` that is penalised (the paper: DANN or CDAN), or its key; by default the labels' loss alone.
        weight: The factor :math:`\beta`.
        k: How many singular values.

    References:
        Chen, Wang, Long and Wang, "Transferability vs. Discriminability: Batch Spectral Penalization for Adversarial Domain Adaptation", ICML 2019.

    >>> BSP()
    BSP(inner=None, weight=0.0001, k=1)
    """

    equation = r"\mathcal{L} + \beta \sum_{i \le k} (\sigma_{s,i}^2 + \sigma_{t,i}^2)"
    needs_features = True

    inner: Objective | str | None = None
    weight: float = 1e-4
    k: int = 1

    def __post_init__(self) -> None:
        inner = self.objective
        if inner is not None and (inner.setting != "adaptation" or type(inner).update is not Objective.update):
            raise InputError(f"BSP penalises an objective of source and target with one loss; {type(inner).__name__} is none")

    def loss(self, s: Step) -> Tensor:
        inner = task_loss(s.s) if self.objective is None else self.objective.loss(s)
        return inner + self.weight * spectral_penalty(s.s.h, s.t.h, self.k)
