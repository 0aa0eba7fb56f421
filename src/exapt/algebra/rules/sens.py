"""Sens-Merging: coefficients of layers from the sensitivity within a task and between tasks (Liu et al., ACL Findings 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.streamed import Parts
from exapt.core.errors import InputError


def _streamed(parts: Parts, weights: Tensor | None = None, statistics: Sequence[Tensor] | None = None, *, temperature: float, scale: float) -> Iterator[Tensor]:
    return (sensitivity_guided(deltas, weights, statistics, temperature=temperature, scale=scale) for deltas in parts)


@rule("sens_merging", paper="Sens-Merging: Sensitivity-Guided Parameter Balancing for Merging Large Language Models", streamed=_streamed)
def sensitivity_guided(
    deltas: Tensor, weights: Tensor | None = None, statistics: Sequence[Tensor] | None = None, *, temperature: float = 1.0, scale: float = 1.0
) -> Tensor:
    r"""Task arithmetic with coefficients for each layer, :math:`\lambda m \sum_i \sigma_i^l \delta_i^l`.

    :math:`\sigma^l = \mathrm{softmax}_i(\alpha_i^l \tau_i / T)`; :math:`\delta_i^l` is the task vector, :math:`\alpha_i^l` layer l's share of
    model i's sensitivity (:func:`exapt.algebra.statistics.layer_scores`) and the weight :math:`\tau_i` its score between tasks
    (:func:`exapt.algebra.statistics.logit_distances`). For other rules (TIES, DARE), scale the models first: :func:`sensitivity_scaled`.
    There is no official code, and the paper's text could not be read: this follows its abstract and summaries, and for the formulas a public
    reimplementation; whether the paper's cross-task score grows with the distance of logits, as there, is not certain.

    Args:
        deltas: Task vectors (m, ...).
        weights: Cross-task scores (m,); by default 1 / m each.
        statistics: Scores () of the tensor's layer in each model; without them the coefficients are equal.
        temperature: T.
        scale: The factor :math:`\lambda`.

    Returns:
        (...).

    Raises:
        InputError: for a temperature that is not positive, or statistics that are not one number for each model.

    References:
        Liu et al., "Sens-Merging: Sensitivity-Guided Parameter Balancing for Merging Large Language Models", Findings of ACL 2025.

    >>> sensitivity_guided(torch.tensor([[1.0], [3.0]]))
    tensor([4.])
    """
    return scale * torch.tensordot(coefficients(deltas, weights, statistics, temperature), deltas, 1)


def coefficients(deltas: Tensor, weights: Tensor | None, statistics: Sequence[Tensor] | None, temperature: float) -> Tensor:
    r""":math:`m\,\sigma^l` (m,)."""
    m = len(deltas)
    if temperature <= 0:
        raise InputError(f"sens_merging: temperature {temperature} must be positive")
    if statistics is None:
        return deltas.new_ones(m)
    if len(statistics) != m or any(s.numel() != 1 for s in statistics):
        raise InputError(f"sens_merging: statistics {[tuple(s.shape) for s in statistics]}; give one number a model (layer_scores makes them)")
    tau = deltas.new_full((m,), 1 / m) if weights is None else weights
    alpha = torch.stack([s.to(deltas).reshape(()) for s in statistics])
    return m * (alpha * tau / temperature).softmax(0)


def sensitivity_scaled(
    models: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor], statistics: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None, *, temperature: float = 1.0,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Models whose task vectors are multiplied by Sens-Merging's coefficients, to be merged by any other rule.

    Args:
        models: Tensors of every model, by name.
        base: The base's.
        statistics: For each model the scores of its layers, by name; a tensor without stays as it is.
        weights: Cross-task scores (m,).
        temperature: T.

    >>> base, moved = {"w": torch.zeros(1)}, [{"w": torch.ones(1)}, {"w": torch.ones(1)}]
    >>> sensitivity_scaled(moved, base, [{"w": torch.tensor(1.0)}, {"w": torch.tensor(1.0)}])[0]
    {'w': tensor([1.])}
    """
    tau = None if weights is None else torch.tensor(weights)
    scaled: list[dict[str, Tensor]] = [{} for _ in models]
    for name, still in base.items():
        if not still.is_floating_point() or any(name not in s for s in statistics):
            own = [m[name] for m in models]
        else:
            wide = still.to(torch.promote_types(still.dtype, torch.float32))
            deltas = torch.stack([m[name].to(wide.dtype) - wide for m in models])
            factors = coefficients(deltas, None if tau is None else tau.to(wide), [s[name] for s in statistics], temperature)
            own = [(wide + f * d).to(still.dtype) for f, d in zip(factors, deltas, strict=True)]
        for tree, t in zip(scaled, own, strict=True):
            tree[name] = t
    return scaled
