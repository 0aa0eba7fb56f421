"""WIDEN: magnitudes and directions of columns, each weighed by how far a model has moved it (Yu et al., 2024)."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.algebra.rule import rule


@rule("widen", paper="Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight Disentanglement")
def disentangled(
    deltas: Tensor, base: Tensor, weights: Tensor | None = None, name: str = "", *, ratio: float = 1.0, calibration: float | None = 1.0,
    embeddings: str = r"embed|\bwte\b|\bwpe\b",
) -> Tensor:  # fmt: skip
    r"""Sum of task vectors with a score for every model and column, :math:`\sum_i \tfrac12 (s^m_i + s^d_i) \odot \tau_i`.

    Each weight matrix (d_out, d_in) is a magnitude (norm) and a direction for every column. In each model, the columns are ranked by how far
    their magnitude has moved, and by one minus the cosine of their directions; ranks divided by d_in go through a softmax over the models,
    which gives :math:`s^m` and :math:`s^d`. Scores of columns whose rank is above ``ratio`` times the model's mean become ``calibration``:
    what matters to a model it keeps whole. Vectors use their entries' absolute changes in place of ranks. Followed: the official code, which
    ranks an embedding's tokens; matrices of more than two dimensions, which it does not have, are flattened to (d_out, -1).

    Args:
        deltas: Task vectors (m, ...).
        base: (...).
        weights: (m,), factors of the merged task vectors; by default 1 each.
        name: The tensor's.
        ratio: How many times the mean is above average.
        calibration: Score of what is above average; ``None``: none is calibrated, and scores add up to 1.
        embeddings: Expression for names of matrices (tokens, dimensions), which are turned round.

    Returns:
        (...).

    References:
        Yu et al., "Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight Disentanglement", 2024.

    >>> disentangled(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.ones(1, 2), calibration=None).round(decimals=3)
    tensor([[0.5610, 0.5610]])
    """
    turned = deltas.dim() == 3 and bool(re.search(embeddings, name))
    flat = deltas.mT if turned else deltas.flatten(2) if deltas.dim() > 2 else deltas
    if deltas.dim() > 2:
        still = base.mT if turned else base.flatten(1)
        moved = still + flat
        magnitude = (moved.norm(dim=1) - still.norm(dim=0)).abs()
        direction = (1 - F.cosine_similarity(moved, still[None], dim=1)) * (flat != 0).any(1)  # exactly 0 where nothing moved
        scores = (_scores(_ranks(magnitude), ratio, calibration) + _scores(_ranks(direction), ratio, calibration))[:, None] / 2
    else:
        scores = _scores(flat.abs(), ratio, calibration)
    if weights is not None:
        scores = scores * weights.reshape(-1, *[1] * (flat.dim() - 1))
    merged = (scores * flat).sum(0)
    return merged.mT if turned else merged.reshape(base.shape)


def _ranks(d: Tensor) -> Tensor:
    """Each entry's place in its row, from 0 below 1."""
    return d.argsort(dim=1, stable=True).argsort(dim=1).to(d.dtype) / d.shape[1]


def _scores(significance: Tensor, ratio: float, calibration: float | None) -> Tensor:
    scores = significance.softmax(0)
    if calibration is None:
        return scores
    mean = significance.flatten(1).mean(1).reshape(-1, *[1] * (significance.dim() - 1))
    return torch.where(significance > ratio * mean, calibration, scores)
