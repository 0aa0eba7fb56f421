"""Greedy soups: models are averaged one after the other as long as validation does not suffer (Wortsman et al., ICML 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from exapt.algebra.choose.rows import Tree, checked_rows
from exapt.algebra.choose.uncertainty import Choice, bootstrap_choice
from exapt.algebra.tensors import merge_tensors
from exapt.core.components import component
from exapt.core.errors import InputError


@dataclass(frozen=True)
class Step:
    """One model's turn.

    Attributes:
        name: The model.
        alone: Its own validation score.
        with_it: The score of the average with it.
        taken: Whether it stays in.
    """

    name: str
    alone: float
    with_it: float
    taken: bool


@dataclass(frozen=True)
class Soup:
    """A greedy soup.

    Attributes:
        tensors: The average of the models taken.
        taken: Their names, in the order in which they came in.
        score: Its validation score; never below the best model's.
        steps: What happened with each model, best first.
        choice: The soup (candidate 0) against each single model (in the order of ``steps``) over bootstrapped rows; None where the
            scores are single numbers.
    """

    tensors: dict[str, Tensor]
    taken: tuple[str, ...]
    score: float
    steps: tuple[Step, ...]
    choice: Choice | None


@component(
    "greedy_soup",
    kind="weight choice",
    paper="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
)
def greedy_soup(
    models: Sequence[Tree], evaluate: Callable[[Tree], Tensor | float], names: Sequence[str] | None = None, *, strict: bool = False, seed: int = 0
) -> Soup:
    """Averages models of one start greedily: sorted by validation score, each is kept if the average with it is no worse than without.

    Args:
        models: Tensors of every model, by name.
        evaluate: Scores tensors, higher better: one number, or one for each validation row (:func:`~exapt.algebra.choose.rows.row_scores`).
        names: What the models are called.
        strict: Whether a model must raise the score to be kept, as in the official code; the paper's recipe keeps it on a tie.
        seed: Of the bootstrap over rows.

    Returns:
        :class:`Soup`. Models whose scores tie are tried in the order given.

    Raises:
        InputError: for no model, another number of names, or models that do not hold the same tensors.

    References:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time", ICML
        2022 (recipe 1).

    >>> import torch
    >>> models = [{"w": torch.tensor(x)} for x in (0.0, 3.0, 6.0)]
    >>> soup = greedy_soup(models, lambda t: -abs(t["w"] - 2), names=["a", "b", "c"])
    >>> soup.taken, soup.tensors["w"].item(), [s.with_it for s in soup.steps]
    (('b', 'a'), 1.5, [-1.0, -0.5, -1.0])
    """
    called = list(names) if names is not None else [f"model {i}" for i in range(len(models))]
    if len(called) != len(models) or not models:
        raise InputError(f"greedy_soup: {len(called)} names for {len(models)} models; give at least one model and a name for each")
    rows = [checked_rows(evaluate(m), "greedy_soup") for m in models]
    alone = [float(r.double().mean()) for r in rows]
    order = sorted(range(len(models)), key=lambda i: -alone[i])
    first = order[0]
    soup, score, own, inside = dict(models[first]), alone[first], rows[first], [first]
    steps = [Step(called[first], alone[first], alone[first], True)]
    for i in order[1:]:
        tried = merge_tensors("average", [models[j] for j in (*inside, i)], names=[called[j] for j in (*inside, i)])
        found = checked_rows(evaluate(tried), "greedy_soup")
        mean = float(found.double().mean())
        taken = mean > score if strict else mean >= score
        steps.append(Step(called[i], alone[i], mean, taken))
        if taken:
            soup, score, own = tried, mean, found
            inside.append(i)
    choice = bootstrap_choice([own, *(rows[i] for i in order)], seed=seed) if len(own) > 1 else None
    return Soup(soup, tuple(called[i] for i in inside), score, tuple(steps), choice)
