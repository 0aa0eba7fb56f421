"""Arithmetic of logits: what small models learned, added to a large one's predictions as it decodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.errors import InputError

MOST = 20_000


@component(
    "logit_ensemble",
    kind="logit fusion",
    paper="Model Editing with Canonical Examples",
    variants={"Tuning Language Models by Proxy": "logit_ensemble(large, tuned, small, alpha=1.0)"},
)
def logit_ensemble(large: Tensor, tuned: Tensor | Sequence[Tensor], small: Tensor, alpha: float | Sequence[float] | Tensor = 1.0) -> Tensor:
    r"""Adds what edits or fine-tuning changed in small models to a large model's logits: :math:`z = z^L + \sum_t \alpha_t (z_t^S - z^S)`.

    Args:
        large: The large model's logits (..., vocabulary).
        tuned: Those of the edited or fine-tuned small model, or of several.
        small: The small model's as it was.
        alpha: The weight :math:`\alpha_t`, one for all or one for each.

    Returns:
        (..., vocabulary).

    Raises:
        InputError: for logits of several shapes, NaN or infinity, or another number of weights.

    References:
        Hewitt, Chen, Xie, Adams, Liang and Manning, "Model Editing with Canonical Examples", 2024 (a large model improved by an edited small one).
        Liu, Han, Wang, Tsvetkov, Choi and Smith, "Tuning Language Models by Proxy", COLM 2024.

    >>> logit_ensemble(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]))
    tensor([3., 2.])
    """
    experts = _same_vocabulary(large, [tuned] if isinstance(tuned, Tensor) else tuned, small, "logit_ensemble")
    weights = torch.as_tensor(alpha, dtype=large.dtype, device=large.device)
    weights = weights.expand(len(experts)) if weights.ndim == 0 else weights
    if weights.shape != (len(experts),):
        raise InputError(f"logit_ensemble: {tuple(weights.shape)} weights for {len(experts)} small models; give one for all or one for each")
    return large + torch.tensordot(weights, torch.stack(list(experts)) - small, 1)


@dataclass(frozen=True)
class Fused:
    """Logits fused with weights of their own at every position.

    Attributes:
        logits: (..., vocabulary).
        alphas: The weights (..., experts).
        gap: The objective's value there (...): how far the divergences are from those of the experts.
    """

    logits: Tensor
    alphas: Tensor
    gap: Tensor


@component("dynamic_logits_fusion", kind="logit fusion", paper="On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion")
def dynamic_logits_fusion(
    large: Tensor, tuned: Tensor | Sequence[Tensor], small: Tensor, *, low: float = 0.0, high: float = 2.0, points: int = 21,
    experts: Literal["one", "all"] = "one",
) -> Fused:  # fmt: skip
    r"""As :func:`logit_ensemble`, with weights solved for at every position: the large model shall move as far as the small ones did.

    With :math:`P, \tilde P` the large model's predictions before and after and :math:`Q, Q_t` the small ones',
    :math:`\min_\alpha \sum_t \big(D(\tilde P \| P) - D(Q_t \| Q)\big)^2 + \big(D(P \| \tilde P) - D(Q \| Q_t)\big)^2` with the Kullback-Leibler
    divergence :math:`D`, on a grid.

    Args:
        large: The large model's logits (..., vocabulary), at one position or many.
        tuned: Those of the fine-tuned small model, or of several.
        small: The small model's as it was.
        low: Smallest weight.
        high: Largest weight.
        points: Points of the grid, both ends among them.
        experts: ``"one"``: a single expert has a weight at a position, which the paper's experiments do; ``"all"``: every combination of
            the grid's points is tried.

    Returns:
        :class:`Fused`. Among equals the combination nearest the grid's beginning wins.

    Raises:
        InputError: for logits of several shapes, NaN or infinity, a grid without points, or more than 20,000 combinations.

    The authors' repository holds no code; the paper was followed (a grid search over [0, 2], at most 20 evaluations for each expert).

    References:
        Fan, Lu, Wei, Tian, Qu, Chen and Cheng, "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", NeurIPS 2024.

    >>> small, tuned = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 2.0])
    >>> dynamic_logits_fusion(small, tuned, small).alphas  # of the same size: the expert itself
    tensor([1.])
    """
    changed = _same_vocabulary(large, [tuned] if isinstance(tuned, Tensor) else tuned, small, "dynamic_logits_fusion")
    if points < 1 or not low <= high:
        raise InputError(f"dynamic_logits_fusion: no grid of {points} points from {low} to {high}; give at least one point and low <= high")
    grid = _combinations(torch.linspace(low, high, points).tolist(), len(changed), experts)
    before, q = large.log_softmax(-1), small.log_softmax(-1)
    ways = torch.stack([t - small for t in changed])
    wanted = [(_divergence(t.log_softmax(-1), q), _divergence(q, t.log_softmax(-1))) for t in changed]

    gap = large.new_full(large.shape[:-1], torch.inf)
    alphas = large.new_zeros(*large.shape[:-1], len(changed))
    for combination in grid:
        weights = large.new_tensor(combination)
        after = (large + torch.tensordot(weights, ways, 1)).log_softmax(-1)
        there, back = _divergence(after, before), _divergence(before, after)
        cost = torch.stack([(there - a).square() + (back - b).square() for a, b in wanted]).sum(0)
        nearer = cost < gap
        gap, alphas = torch.where(nearer, cost, gap), torch.where(nearer[..., None], weights, alphas)
    return Fused(large + torch.einsum("...t,t...v->...v", alphas, ways), alphas, gap)


@dataclass(eq=False)
class LogitsFusion:
    """Fuses logits while a model generates: a logits processor for ``generate`` of transformers, or a step of one's own loop.

    Args:
        small: The small model: called with the tokens so far (batch, length), it gives logits (batch, length, vocabulary), or an output that
            has them.
        tuned: The fine-tuned small models.
        alpha: Fixed weights (:func:`logit_ensemble`), or None to solve for them at every step.
        settings: Of :func:`dynamic_logits_fusion`.

    Attributes:
        alphas: The weights of every step so far, (batch, experts) each; empty with fixed ones.

    The small models read the whole text at every step, without a cache. Put it first among several processors.

    >>> def model(ids, z=torch.eye(3)):
    ...     return z[ids]
    >>> fusion = LogitsFusion(model, [lambda ids: 2 * model(ids)], alpha=1.0)
    >>> fusion(torch.tensor([[0, 2]]), torch.zeros(1, 3))
    tensor([[0., 0., 1.]])
    """

    small: Callable[[Tensor], Any]
    tuned: Sequence[Callable[[Tensor], Any]]
    alpha: float | Sequence[float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    alphas: list[Tensor] = field(default_factory=list, init=False)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The next token's fused logits (batch, vocabulary), from the tokens so far and the large model's logits."""

        def following(model: Callable[[Tensor], Any]) -> Tensor:
            output = model(input_ids)
            logits: Tensor = getattr(output, "logits", output)
            return logits[:, -1].to(scores)

        with torch.no_grad():
            small, tuned = following(self.small), [following(m) for m in self.tuned]
            if self.alpha is not None:
                return logit_ensemble(scores, tuned, small, self.alpha)
            found = dynamic_logits_fusion(scores, tuned, small, **self.settings)
        self.alphas.append(found.alphas)
        return found.logits


def _combinations(values: list[float], count: int, experts: str) -> list[tuple[float, ...]]:
    """The weights to try, those of small sums first."""
    if experts == "one":
        alone = ([value if i == t else 0.0 for i in range(count)] for value in values for t in range(count))
        return [tuple(a) for a in alone]
    if experts != "all":
        raise InputError(f'dynamic_logits_fusion: experts is "{experts}"; take "one" or "all"')
    if len(values) ** count > MOST:
        raise InputError(
            f"dynamic_logits_fusion: {len(values)} points for each of {count} experts are over {MOST} combinations; take fewer points or experts='one'"
        )
    return sorted(itertools.product(values, repeat=count), key=sum)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of log-probabilities (..., vocabulary)."""
    return (p.exp() * (p - q)).sum(-1)


def _same_vocabulary(large: Tensor, tuned: Sequence[Tensor], small: Tensor, name: str) -> Sequence[Tensor]:
    if not len(tuned):
        raise InputError(f"{name}: there is no fine-tuned small model")
    for called, z in (("the small model", small), *((f"small model {i}", z) for i, z in enumerate(tuned)), ("the large model", large)):
        if z.shape != large.shape or z.ndim < 1:
            raise InputError(f"{name}: {called} has logits {tuple(z.shape)}, the large one {tuple(large.shape)}; all need one vocabulary and the same text")
        if not bool(torch.isfinite(z).all()):
            raise InputError(f"{name}: the logits of {called} hold NaN or infinity; fuse before tokens are masked out")
    return tuned
