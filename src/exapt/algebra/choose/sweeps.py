"""Sweeps: WiSE-FT's line from the base to a fine-tuned model, and weights of any merge rule chosen from a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exapt.algebra.choose.rows import Evaluate, Tree, checked_rows
from exapt.algebra.choose.uncertainty import Choice, bootstrap_choice
from exapt.algebra.tensors import merge_tensors
from exapt.core.components import component
from exapt.core.errors import InputError

TENTHS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class Curve:
    """WiSE-FT's curve.

    Attributes:
        alphas: Shares of the fine-tuned model.
        scores: Of each set the mean scores (k,), one for each share.
        alpha: The share chosen.
        tensors: The model there.
        choice: How sure it is; ``choice.shares`` and ``choice.plausible`` go by the positions in ``alphas``.
    """

    alphas: tuple[float, ...]
    scores: Mapping[str, Tensor]
    alpha: float
    tensors: dict[str, Tensor]
    choice: Choice


@component("wise_ft", kind="weight choice", paper="Robust fine-tuning of zero-shot models")
def wise_ft(
    base: Tree, tuned: Tree, evaluate: Evaluate | Mapping[str, Evaluate], alphas: Sequence[float] = TENTHS, *, by: str | None = None,
    seed: int = 0,
) -> Curve:  # fmt: skip
    r"""The line :math:`\theta_\alpha = (1 - \alpha)\,\theta_0 + \alpha\,\theta_1` from the base to a fine-tuned model, scored along the way.

    Args:
        base: The base's tensors :math:`\theta_0`, with the head that the fine-tuning started from.
        tuned: The fine-tuned model's :math:`\theta_1`.
        evaluate: Scores tensors on validation rows (:func:`~exapt.algebra.choose.rows.row_scores`), or several such functions by the name
            of their set: the training distribution and shifted ones.
        alphas: Shares to try.
        by: The set that chooses; by default the first. Without rows to choose by, the authors recommend 0.5.
        seed: Of the bootstrap over rows.

    Returns:
        :class:`Curve`. At 0 and 1 the tensors are the two models', bit for bit.

    Raises:
        InputError: for no share or one that is not finite, a set that is not there, or models that do not hold the same tensors.

    References:
        Wortsman, Ilharco, Kim, Li et al., "Robust fine-tuning of zero-shot models", CVPR 2022.

    >>> curve = wise_ft({"w": torch.tensor(0.0)}, {"w": torch.tensor(2.0)}, lambda t: -(t["w"] - 1.4).abs()[None])
    >>> curve.alpha
    0.7
    """
    sets = dict(evaluate) if isinstance(evaluate, Mapping) else {"validation": evaluate}
    chosen_by = by if by is not None else next(iter(sets), "")
    if chosen_by not in sets:
        raise InputError(f'wise_ft: no set "{chosen_by}"; there are {", ".join(sets) or "none"}')
    if not len(alphas) or not all(torch.isfinite(torch.tensor(float(a))) for a in alphas):
        raise InputError(f"wise_ft: the shares are {list(alphas)}; give finite numbers, 0 for the base to 1 for the fine-tuned model")

    def at(alpha: float) -> dict[str, Tensor]:
        return merge_tensors("average", [base, tuned], weights=[1 - alpha, alpha], names=["the base", "the fine-tuned model"], normalise=False)

    rows: dict[str, list[Tensor]] = {name: [] for name in sets}
    for alpha in alphas:
        tensors = at(alpha)
        for name, scores in sets.items():
            rows[name].append(checked_rows(scores(tensors), "wise_ft"))
    choice = bootstrap_choice(rows[chosen_by], seed=seed)
    alpha = float(alphas[choice.best])
    means = {name: torch.stack([r.mean() for r in own]) for name, own in rows.items()}
    return Curve(tuple(float(a) for a in alphas), means, alpha, at(alpha), choice)


@dataclass(frozen=True)
class ChosenWeights:
    """Weights chosen for a merge.

    Attributes:
        weights: One for each model.
        candidates: What was tried.
        tensors: The merged model.
        choice: How sure it is; indices go by ``candidates``.
    """

    weights: tuple[float, ...]
    candidates: tuple[tuple[float, ...], ...]
    tensors: dict[str, Tensor]
    choice: Choice

    @property
    def interval(self) -> tuple[tuple[float, float], ...]:
        """For each model the smallest and largest weight among the plausible candidates."""
        likely = [self.candidates[i] for i in self.choice.plausible]
        return tuple((min(column), max(column)) for column in zip(*likely, strict=True))


@component("choose_weights", kind="weight choice", paper="Editing Models with Task Arithmetic", oracle="brute force")
def choose_weights(
    rule: str | Callable[..., Tensor], models: Sequence[Tree], base: Tree | None, evaluate: Evaluate,
    candidates: Sequence[Sequence[float]] | None = None, *, names: Sequence[str] | None = None, seed: int = 0, **config: Any,
) -> ChosenWeights:  # fmt: skip
    """Weights of a merge rule from a list, chosen by validation rows with labels or without, and how sure the choice is.

    Args:
        rule: A merge rule that takes weights, or its key.
        models: Tensors of every model, by name.
        base: The base's, if the rule needs it.
        evaluate: Scores tensors on validation rows (:func:`~exapt.algebra.choose.rows.row_scores`: with a few labels by accuracy, without by
            the predictions' entropy).
        candidates: Weights to try, one for each model; by default one and the same for all models, from 0.1 to 1 by tenths (the sweep of task
            arithmetic).
        names: What messages call the models.
        seed: Of a rule that draws, and of the bootstrap over rows.
        **config: The rule's configuration.

    Returns:
        :class:`ChosenWeights`. A low entropy is no high accuracy: without labels the interval says how stable the choice is, not how good.

    Raises:
        InputError: for what cannot be merged or a candidate that is not one weight for each model.

    References:
        Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023 (one scale for all, by held-out accuracy).

    >>> found = choose_weights("task_arithmetic", [{"w": torch.tensor(1.0)}], {"w": torch.tensor(0.0)}, lambda t: -(t["w"] - 0.3).abs()[None])
    >>> found.weights
    (0.3,)
    """
    tried = [tuple(float(x) for x in c) for c in candidates] if candidates is not None else [(a,) * len(models) for a in TENTHS[1:]]
    if not tried:
        raise InputError("choose_weights: there is no candidate; give a list of weights, one for each model")

    def at(weights: tuple[float, ...]) -> dict[str, Tensor]:
        return merge_tensors(rule, models, base, weights, names=names, seed=seed, **config)

    choice = bootstrap_choice([checked_rows(evaluate(at(w)), "choose_weights") for w in tried], seed=seed)
    return ChosenWeights(tried[choice.best], tuple(tried), at(tried[choice.best]), choice)
