"""Git re-basin: hidden units of one model brought into another's order (Ainsworth, Hayase and Srinivasa, ICLR 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exapt.algebra.transfer.units import Permutations, Tree, UnitSpec, checked_permutations, permuted
from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError

PAPER = "Git Re-Basin: Merging Models modulo Permutation Symmetries"


@component("apply_permutation", kind="transfer", paper=PAPER, oracle="the model itself: its outputs do not change")
def apply_permutation(tensors: Tree, perms: Permutations, spec: UnitSpec) -> dict[str, Tensor]:
    r"""Renames hidden units: unit i of the result is unit :math:`\pi_i` of what is given. As a function the model stays the same.

    Task vectors permute as models do, so a parameter shift of base b moves to base a as :math:`\theta_a + \pi(\theta_b' - \theta_b)`.

    Args:
        tensors: A model's, or differences of two models', by name.
        perms: For each permutation of ``spec`` an order (units,) int64.
        spec: What the tensors' axes count.

    Returns:
        All tensors, those without a permutation as they are.

    Raises:
        InputError: for tensors or permutations that do not fit the specification.

    References:
        Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023.

    >>> spec = UnitSpec({"w": ("h", None)})
    >>> apply_permutation({"w": torch.tensor([[1.0], [2.0]])}, {"h": torch.tensor([1, 0])}, spec)
    {'w': tensor([[2.],
            [1.]])}
    """
    perms = checked_permutations(perms, spec.counts(tensors))
    return {k: permuted(t, spec.axes[k], perms) if k in spec.axes else t for k, t in tensors.items()}


@component("weight_matching", kind="transfer", paper=PAPER, oracle="brute force over all permutations")
def weight_matching(target: Tree, source: Tree, spec: UnitSpec, *, start: Permutations | None = None, sweeps: int = 100, seed: int = 0) -> dict[str, Tensor]:
    r"""Finds permutations of one model's hidden units that bring it near another: a local minimum of :math:`\|\theta_a - \pi(\theta_b)\|_2`.

    One permutation at a time, in random order, the others held, is a linear assignment problem:

    .. math:: \pi_l \leftarrow \arg\max_\pi \sum_{(w, k)} \langle w^a_{(k)},\, P_\pi\, \pi_{-l}(w^b)_{(k)} \rangle

    over all tensors w and axes k that count the units l (:math:`w_{(k)}` unfolded along k), until a whole sweep gains nothing. One hidden layer is
    solved exactly.

    Args:
        target: :math:`\theta_a`, by name.
        source: :math:`\theta_b`, which is to be permuted.
        spec: What the tensors' axes count (:func:`~exapt.algebra.transfer.units.sequential_units`).
        start: Permutations to begin with; by default none.
        sweeps: Sweeps at most.
        seed: Of the order in which permutations are solved.

    Returns:
        Permutations for :func:`apply_permutation` on ``source``.

    Raises:
        InputError: for models that do not fit the specification or each other, or hold NaN or infinity.

    References:
        Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023 (algorithm 1).

    >>> spec = UnitSpec({"w": ("h", None)})
    >>> weight_matching({"w": torch.tensor([[1.0], [2.0]])}, {"w": torch.tensor([[2.0], [1.0]])}, spec)
    {'h': tensor([1, 0])}
    """
    return match_pairs([(target, source)], spec, start=start, sweeps=sweeps, seed=seed)


def match_pairs(
    pairs: Sequence[tuple[Tree, Tree]], spec: UnitSpec, *, start: Permutations | None = None, sweeps: int = 100, normalise: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """As :func:`weight_matching`, for the sum over several pairs of a target and a source.

    Args:
        pairs: Targets and sources.
        spec: What the tensors' axes count.
        start: Permutations to begin with.
        sweeps: Sweeps at most.
        normalise: Whether each pair of tensors is divided by the product of their norms.
        seed: Of the order.
    """
    from scipy.optimize import linear_sum_assignment

    counts = spec.counts(_checked(pairs, spec))
    perms = {u: torch.arange(n) for u, n in counts.items()} if start is None else checked_permutations(start, counts)
    places, units, generator = spec.places(), list(counts), seeded(seed, "weight_matching")
    for _ in range(sweeps):
        gained = False
        for i in torch.randperm(len(units), generator=generator).tolist():
            unit, n = units[i], counts[units[i]]
            gains = torch.zeros(n, n, dtype=torch.double)
            for target, source in pairs:
                for name, axis in places[unit]:
                    a, b = _unfolded(target[name], axis, n), _unfolded(permuted(source[name], spec.axes[name], perms, skip=axis), axis, n)
                    scale = float(a.norm() * b.norm()) if normalise else 1.0
                    gains += a @ b.T / scale if scale > 1e-12 else 0.0
            _, order = linear_sum_assignment(gains.numpy(), maximize=True)
            new, rows = torch.from_numpy(order), torch.arange(n)
            before, after = float(gains[rows, perms[unit]].sum()), float(gains[rows, new].sum())
            if after > before + 1e-9 * max(1.0, abs(before)):  # a tie keeps what was: no wandering between equals
                perms[unit], gained = new, True
        if not gained:
            break
    return perms


def _unfolded(t: Tensor, axis: int, n: int) -> Tensor:
    return t.movedim(axis, 0).reshape(n, -1).double().cpu()


def _checked(pairs: Sequence[tuple[Tree, Tree]], spec: UnitSpec) -> Tree:
    if not pairs:
        raise InputError("weight matching: there is nothing to match")
    for target, source in pairs:
        spec.counts(target)
        spec.counts(source)
        for name in spec.axes:
            a, b = target[name], source[name]
            if a.shape != b.shape:
                raise InputError(f"weight matching: {name} has shape {tuple(a.shape)} in the target and {tuple(b.shape)} in the source")
            if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
                raise InputError(f"weight matching: {name} holds NaN or infinity")
    return pairs[0][0]
