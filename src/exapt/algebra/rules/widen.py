"""WIDEN: magnitudes and directions of columns, each weighed by how far a model has moved it (Yu et al., 2024)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.streamed import Parts, in_parts


def _streamed(parts: Parts, weights: Tensor | None = None, name: str = "", *, ratio: float, calibration: float | None, embeddings: str) -> Iterator[Tensor]:
    factors = torch.ones(len(parts), 1) if weights is None else weights[:, None]
    if len(parts.shape) < 2:
        sums = torch.zeros(len(parts), 1, dtype=torch.float64)
        for deltas in parts:
            sums += deltas.abs().sum(1, keepdim=True, dtype=torch.float64)
        for deltas in parts:
            yield (factors.to(deltas) * _scores(deltas.abs(), ratio, calibration, sums / parts.elements) * deltas).sum(0)
        return
    turned, size, row = _turned(parts.shape, name, embeddings), parts.elements // parts.shape[0], 0
    scores = (factors * sum(_scores(_ranks(d), ratio, calibration) for d in _moved(parts, turned)) / 2).to(parts.dtype)
    for deltas in parts.rows(size):
        own = scores[:, row : row + deltas.shape[1], None] if turned else scores[:, None]
        row += deltas.shape[1]
        yield (own * deltas).sum(0)


@rule("widen", paper="Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight Disentanglement", streamed=_streamed)
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
    merged = _streamed(in_parts(deltas, base), weights, name, ratio=ratio, calibration=calibration, embeddings=embeddings)
    return torch.cat([part.reshape(-1) for part in merged] or [deltas.new_empty(0)]).reshape(base.shape)


def _turned(shape: tuple[int, ...], name: str, embeddings: str) -> bool:
    return len(shape) == 2 and bool(re.search(embeddings, name))


def _moved(parts: Parts, turned: bool) -> tuple[Tensor, Tensor]:
    """How far the magnitude and the direction of every column have moved, (m, columns) each, in double precision."""
    size = parts.elements // parts.shape[0]
    sums, row = torch.zeros(4, len(parts), parts.shape[0] if turned else size, dtype=torch.float64), 0
    for part, base in parts.pairs(size):
        assert base is not None
        flat, still = part.unflatten(1, (-1, size)).double(), base.reshape(-1, size).double()
        moved, along = flat + still, -1 if turned else -2
        own = still.square().sum(along).expand(len(part), -1)
        place = sums[..., row : row + flat.shape[1]] if turned else sums
        place += torch.stack([moved.square().sum(along), own, (moved * still).sum(along), flat.abs().sum(along)])
        row += flat.shape[1]
    now, before = sums[0].sqrt(), sums[1].sqrt()
    cosines = sums[2] / (now.clamp(min=1e-8) * before.clamp(min=1e-8))
    return (now - before).abs(), (1 - cosines) * (sums[3] > 0)  # exactly 0 where nothing moved


def _ranks(d: Tensor) -> Tensor:
    """Each entry's place in its row, from 0 below 1."""
    return d.argsort(dim=1, stable=True).argsort(dim=1).to(d.dtype) / d.shape[1]


def _scores(significance: Tensor, ratio: float, calibration: float | None, mean: Tensor | None = None) -> Tensor:
    scores = significance.softmax(0)
    if calibration is None:
        return scores
    mean = significance.mean(1, keepdim=True) if mean is None else mean.to(significance)
    return torch.where(significance > ratio * mean, calibration, scores)
