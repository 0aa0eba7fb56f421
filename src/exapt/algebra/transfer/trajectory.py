"""Learning trajectories moved to another start: gradients matched along the way by permutations (Chijiwa, ICLR 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exapt.algebra.transfer.permutation import match_pairs
from exapt.algebra.transfer.units import Tree, UnitSpec, permuted
from exapt.core.components import component
from exapt.core.errors import InputError

Gradient = Callable[[dict[str, Tensor], int], Tree]


@dataclass(frozen=True)
class Transferred:
    """A trajectory on another start.

    Attributes:
        tensors: Where it ends, by name: a start for fine-tuning.
        permutations: Those of the source's hidden units.
        gradients: How many gradients were taken.
    """

    tensors: dict[str, Tensor]
    permutations: dict[str, Tensor]
    gradients: int


def linear_trajectory(first: Tree, last: Tree, steps: int, *, pace: Literal["cosine", "uniform"] = "cosine") -> list[dict[str, Tensor]]:
    r"""The straight line between two checkpoints, which stands for the trajectory where no others were kept.

    Args:
        first, last: The checkpoints.
        steps: T; the line has T + 1 points.
        pace: "uniform", or "cosine": step t is as long as :math:`1 + \cos(\pi t / T)` says, as a cosine learning rate would make it.

    Returns:
        T + 1 trees.

    Raises:
        InputError: for other names or shapes, or no step.

    >>> [round(float(t["w"]), 3) for t in linear_trajectory({"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}, 2)]
    [0.0, 0.667, 1.0]
    """
    odd = next((k for k in first.keys() | last.keys() if k not in first or k not in last or first[k].shape != last[k].shape), None)
    if odd is not None or steps < 1:
        raise InputError(f"linear_trajectory: {odd or 'the line'} is not the same in both checkpoints, or {steps} steps are none")
    lengths = [1 + math.cos(math.pi * t / steps) if pace == "cosine" else 1.0 for t in range(steps)]
    shares = [sum(lengths[:t]) / sum(lengths) for t in range(steps + 1)]
    return [{k: torch.lerp(t, last[k], x) if t.is_floating_point() else t for k, t in first.items()} for x in shares]


@component("trajectory_transfer", kind="transfer", paper="Transferring Learning Trajectories of Neural Networks", oracle="NumPy: brute force over permutations")
def transferred_trajectory(
    source: Sequence[Tree], target: Tree, gradient: Gradient, spec: UnitSpec, *,
    fast: bool = True, normalise: bool = False, warm: bool = False, sweeps: int = 100, seed: int = 0,
) -> Transferred:  # fmt: skip
    r"""Moves what a model learned to another start, without training: :math:`\theta_2^T = \theta_2^0 + \pi_T(\theta_1^T - \theta_1^0)`.

    The permutation is that under which both models' gradients are nearest along the way so far, for s = 1 ... T:

    .. math:: \pi_s = \arg\min_\pi \sum_{t<s} \big\| \nabla L(\theta_2^{t}) - \pi\, \nabla L(\theta_1^t) \big\|^2,
        \qquad \theta_2^{t} = \theta_2^0 + \pi_{s-1}(\theta_1^t - \theta_1^0)

    (:math:`\pi_0` is the identity), solved by :func:`~exapt.algebra.transfer.permutation.match_pairs`. GMT takes all s gradients of the moved
    trajectory anew for each s, T (T + 1) / 2 in all; FGMT (``fast``) only the last, and keeps those that it took under earlier permutations. The
    paper's FGMT also goes along the straight line between the ends (:func:`linear_trajectory`).

    Args:
        source: Checkpoints :math:`\theta_1^0 \dots \theta_1^T` by name.
        target: The other start :math:`\theta_2^0`.
        gradient: ``gradient(tensors, t)``: the training loss's, by name, of the tensors that train. Of one t it must take the same rows for both
            models. Batch norms want their running statistics estimated again for the result.
        spec: What the tensors' axes count.
        fast: FGMT instead of GMT.
        normalise: Whether each pair of gradients of a tensor is divided by its norms.
        warm: Whether each search for a permutation begins with the last one found, not with the identity.
        sweeps: Sweeps of each search at most.
        seed: Of the searches.

    Returns:
        :class:`Transferred`.

    Raises:
        InputError: for fewer than two checkpoints, models that do not fit each other, or gradients that are missing or not finite.

    References:
        Chijiwa, "Transferring Learning Trajectories of Neural Networks", ICLR 2024. The equations were checked against the official code; the
        paper's text was not at hand.

    >>> spec = UnitSpec({"w": ("h", None)})
    >>> source = [{"w": torch.tensor([[0.0], [1.0]])}, {"w": torch.tensor([[0.0], [3.0]])}]
    >>> transferred_trajectory(source, {"w": torch.tensor([[1.0], [0.0]])}, lambda t, _: t, spec).tensors
    {'w': tensor([[3.],
            [0.]])}
    """
    path = [dict(t) for t in source]
    _check(path, target, spec)
    perms = {u: torch.arange(n) for u, n in spec.counts(target).items()}
    known: list[Tree] = []
    pairs: list[tuple[Tree, Tree]] = []
    taken = 0
    for s in range(1, len(path)):
        known.append(_gradient(gradient, path[s - 1], s - 1, spec))
        pairs = pairs if fast else []
        for t in range(len(pairs), s):
            pairs.append((_gradient(gradient, _moved(target, path[0], path[t], perms, spec), t, spec), known[t]))
            taken += 1
        whole = UnitSpec({k: spec.axes[k] for k in known[0] if k in spec.axes}, {u: len(p) for u, p in perms.items()})
        perms = match_pairs(pairs, whole, start=perms if warm else None, sweeps=sweeps, normalise=normalise, seed=seed)
    return Transferred(_moved(target, path[0], path[-1], perms, spec), perms, taken + len(known))


def _moved(target: Tree, first: Tree, now: Tree, perms: dict[str, Tensor], spec: UnitSpec) -> dict[str, Tensor]:
    """The target's start plus the permuted way of the source."""
    moved = {}
    for k, t in target.items():
        step = now[k] - first[k] if t.is_floating_point() else None
        moved[k] = t if step is None else t + (permuted(step, spec.axes[k], perms) if k in spec.axes else step)
    return moved


def _gradient(gradient: Gradient, tensors: dict[str, Tensor], t: int, spec: UnitSpec) -> Tree:
    found = {k: g.detach() for k, g in gradient(tensors, t).items()}
    lacking = [u for u, places in spec.places().items() if not any(name in found for name, _ in places)]
    odd = next((k for k, g in found.items() if k not in tensors or g.shape != tensors[k].shape or not bool(torch.isfinite(g).all())), None)
    if lacking or odd is not None:
        said = f'no tensor of permutation "{lacking[0]}" has a gradient' if lacking else f"the gradient of {odd} is not finite or of another shape"
        raise InputError(f"trajectory_transfer: at step {t} {said}")
    return found


def _check(path: Sequence[Tree], target: Tree, spec: UnitSpec) -> None:
    if len(path) < 2:
        raise InputError(f"trajectory_transfer: {len(path)} checkpoints are no trajectory; give the start and at least one more")
    spec.counts(target)
    for t, tree in enumerate(path):
        odd = next((k for k in target.keys() | tree.keys() if k not in target or k not in tree or target[k].shape != tree[k].shape), None)
        if odd is not None:
            raise InputError(f"trajectory_transfer: {odd} is missing or of another shape in checkpoint {t} or the target; both have one architecture")
