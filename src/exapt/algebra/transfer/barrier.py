"""The loss barrier between two models, on the straight line between their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.algebra.transfer.units import Tree
from exapt.core.components import component
from exapt.core.errors import InputError


@dataclass(frozen=True)
class Barrier:
    """What a loss does between two models.

    Attributes:
        height: The greatest excess over the line between the two ends' losses; zero where there is none.
        at: Where it is, in [0, 1].
        losses: The losses on the way, at equal steps.
    """

    height: float
    at: float
    losses: tuple[float, ...]


@component("interpolation_barrier", kind="transfer", paper="Git Re-Basin: Merging Models modulo Permutation Symmetries", oracle="NumPy")
def interpolation_barrier(loss: Callable[[dict[str, Tensor]], float], first: Tree, second: Tree, *, points: int = 11) -> Barrier:
    r"""The loss barrier between two models: :math:`\max_\lambda L((1-\lambda)\theta_a + \lambda\theta_b) - (1-\lambda)L(\theta_a) - \lambda L(\theta_b)`.

    Running statistics of batch norms are interpolated as weights are; a ``loss`` that estimates them again measures the barrier without them.

    Args:
        loss: Scores tensors by name, lower better.
        first, second: The models.
        points: Models on the way, both ends included.

    Returns:
        :class:`Barrier`.

    Raises:
        InputError: for other names or shapes, fewer than 3 points, or a loss that is not finite.

    References:
        Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023 (section 2).

    >>> interpolation_barrier(lambda t: 1 - float(t["w"]) ** 2, {"w": torch.tensor(-1.0)}, {"w": torch.tensor(1.0)}, points=3)
    Barrier(height=1.0, at=0.5, losses=(0.0, 1.0, 0.0))
    """
    odd = next((k for k in first.keys() | second.keys() if k not in first or k not in second or first[k].shape != second[k].shape), None)
    if odd is not None or points < 3:
        raise InputError(f"interpolation_barrier: {odd or 'the way'} is not the same in both models, or {points} points are too few; give 3 or more")
    way = [i / (points - 1) for i in range(points)]
    losses = [float(loss({k: torch.lerp(t, second[k], x) if t.is_floating_point() else t for k, t in first.items()})) for x in way]
    if not all(torch.isfinite(torch.tensor(losses))):
        raise InputError(f"interpolation_barrier: the loss is not finite on the way: {losses}")
    excess = [value - (1 - x) * losses[0] - x * losses[-1] for x, value in zip(way, losses, strict=True)]
    best = max(range(points), key=lambda i: excess[i])
    return Barrier(max(excess[best], 0.0), way[best], tuple(losses))
