"""Editing delta parameters, and what it does to the loss: pruning, quantisation, low rank and extrapolation in one view (Tang et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError

Tree = Mapping[str, Tensor]
PAPER = "A Unified View of Delta Parameter Editing in Post-Trained Large-Scale Models"


@component("delta_edit", kind="delta editing", paper=PAPER, oracle="NumPy")
def edited_delta(
    deltas: Tree, how: Literal["prune", "quantise", "low_rank", "extrapolate"], *,
    drop: float = 0.5, factor: float | None = None, levels: int = 1, rank: int = 8, scale: float = 1.5, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    r"""Edits the delta parameters :math:`\Delta W` of post-training, tensor by tensor.

    ============  =========================================================================================================
    prune         :math:`k\,(m \odot \Delta W)`, entries dropped with probability p, the rest multiplied by k; DARE is
                  :math:`k = 1 / (1 - p)`, which keeps the mean
    quantise      signs times one size for each of 1 to n groups of sizes: each entry becomes its group's mean size;
                  BitDelta is one group
    low_rank      the best approximation of rank r (matrices; other tensors stay)
    extrapolate   :math:`s\,\Delta W`
    ============  =========================================================================================================

    Args:
        deltas: :math:`\Delta W` by name, in floating point.
        how: What is done.
        drop: p, of "prune".
        factor: k, of "prune"; by default 1 / (1 - p).
        levels: n, of "quantise": groups of as many entries each, by size.
        rank: r, of "low_rank".
        scale: s, of "extrapolate".
        seed: Of what is dropped.

    Returns:
        The edited deltas.

    Raises:
        InputError: for a setting out of its range, or deltas that are not finite.

    References:
        Tang, Yu, Yu, Fan and Li, "A Unified View of Delta Parameter Editing in Post-Trained Large-Scale Models", 2024.

    >>> edited_delta({"w": torch.tensor([1.0, -3.0])}, "quantise")
    {'w': tensor([ 2., -2.])}
    """
    if not 0 <= drop < 1 or levels < 1 or rank < 1:
        raise InputError(f"edited_delta: drop {drop} lies in [0, 1), levels {levels} and rank {rank} are positive")
    bad = next((k for k, t in deltas.items() if not t.is_floating_point() or not bool(torch.isfinite(t).all())), None)
    if bad is not None:
        raise InputError(f"{bad}: a delta must hold finite floating-point numbers")
    kept = factor if factor is not None else 1 / (1 - drop)

    def one(name: str, t: Tensor) -> Tensor:
        if how == "prune":
            mask = torch.rand(t.shape, generator=seeded(seed, name)) >= drop
            return kept * t * mask.to(t)
        if how == "quantise":
            return _quantised(t, levels)
        if how == "low_rank":
            return _low_rank(t, rank)
        if how == "extrapolate":
            return scale * t
        raise InputError(f'edited_delta: how is "{how}"; choose prune, quantise, low_rank or extrapolate')

    return {name: one(name, t) for name, t in deltas.items()}


def _quantised(t: Tensor, levels: int) -> Tensor:
    flat = t.flatten()
    size = flat.abs().clone()
    for part in size.argsort().tensor_split(min(levels, max(len(flat), 1))):
        size[part] = size[part].mean()
    return (flat.sign() * size).view_as(t)


def _low_rank(t: Tensor, rank: int) -> Tensor:
    if t.dim() != 2 or rank >= min(t.shape):
        return t.clone()
    u, s, v = torch.linalg.svd(t.float(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).to(t.dtype)


@component("riemann_loss_change", kind="delta editing", paper=PAPER, oracle="NumPy")
def predicted_change(loss: Callable[[dict[str, Tensor]], Tensor], weights: Tree, change: Tree, *, terms: int = 16) -> float:
    r"""What an edit of delta parameters does to the loss, as a Riemann sum along it.

    .. math:: \Delta\ell = \int_0^1 \langle \Delta, \nabla\ell(W + t \Delta)\rangle\, dt
        \approx \frac1C \sum_{c=0}^{C-1} \langle \Delta, \nabla\ell(W + \tfrac cC \Delta)\rangle

    Near zero the edit is competitive, above it the model gets worse, below it better. The error falls as 1 / C.

    Args:
        loss: From weights by name to a scalar; a graph is made through it.
        weights: :math:`W`, the post-trained weights.
        change: :math:`\Delta`: edited minus given delta parameters, by name; names left out do not change.
        terms: C.

    Returns:
        The predicted change.

    Raises:
        InputError: for names or shapes that are not the weights', or a loss that is no finite scalar.

    References:
        Tang, Yu, Yu, Fan and Li, "A Unified View of Delta Parameter Editing in Post-Trained Large-Scale Models", 2024.

    >>> round(predicted_change(lambda w: w["a"].square().sum(), {"a": torch.tensor([1.0])}, {"a": torch.tensor([1.0])}, terms=100), 2)
    2.99
    """
    odd = next((k for k, t in change.items() if k not in weights or weights[k].shape != t.shape), None)
    if odd is not None or not change or terms < 1:
        raise InputError(
            f"predicted_change: {odd or 'nothing'} is changed in {terms} terms; give changes with names and shapes of the weights, and 1 term or more"
        )
    total = 0.0
    for c in range(terms):
        with torch.enable_grad():
            moved = {k: (w.detach() + c / terms * change[k]).requires_grad_() if k in change else w.detach() for k, w in weights.items()}
            value = loss(moved)
            if value.dim() or not bool(torch.isfinite(value)):
                raise InputError(f"predicted_change: the loss has shape {tuple(value.shape)} or is not finite at {c}/{terms} of the way")
            found = torch.autograd.grad(value, [moved[k] for k in change], allow_unused=True)
        total += sum(float((d * g).sum()) for d, g in zip(change.values(), found, strict=True) if g is not None) / terms
    return total
