"""Merging models that are mappings from names to tensors, one name at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exapt.algebra.rule import Described, rule_of
from exapt.core.contract import seeded
from exapt.core.errors import InputError

Tree = Mapping[str, Tensor]


def merge_tensors(
    rule: str | Callable[..., Tensor], models: Sequence[Tree], base: Tree | None = None, weights: Sequence[float] | None = None, *,
    statistics: Sequence[Mapping[str, Any]] | None = None, names: Sequence[str] | None = None, seed: int = 0, **config: Any,
) -> dict[str, Tensor]:  # fmt: skip
    r"""Merges models of one architecture: :math:`\theta_0 + f(\theta_1 - \theta_0, \dots, \theta_m - \theta_0)` or :math:`f(\theta_1, \dots, \theta_m)`.

    Args:
        rule: A rule, or its key (``exapt.components("merge rule")``).
        models: Tensors of every model, by name; a mapping may read them when they are asked for.
        base: The base's; needed by rules on differences.
        weights: One for each model; by default the rule's own (1 / m, or 1, as its docstring says).
        statistics: For each model what the rule needs of its tensors, by name.
        names: What messages call the models.
        seed: Of rules that draw.
        **config: The rule's configuration.

    Returns:
        Merged tensors in the base's (or first model's) order and dtypes.

    Raises:
        InputError: see :func:`check_trees`; for NaN or infinity in a model, named; for a setting that the rule does not have.

    >>> merge_tensors("average", [{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    {'w': tensor([0.5000, 0.5000])}
    """
    return dict(merged_tensors(rule, models, base, weights, statistics=statistics, names=names, seed=seed, **config))


def merged_tensors(
    rule: str | Callable[..., Tensor], models: Sequence[Tree], base: Tree | None = None, weights: Sequence[float] | None = None, *,
    statistics: Sequence[Mapping[str, Any]] | None = None, names: Sequence[str] | None = None, seed: int = 0, **config: Any,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """As :func:`merge_tensors`, one tensor after the other, so that no more than one of each model need be in memory."""
    found = rule_of(rule)
    config = found.checked(config)
    called = list(names) if names is not None else [f"model {i}" for i in range(len(models))]
    check_trees(found, models, base, weights, called)
    first = base if base is not None else models[0]
    for name in first:
        yield name, merged_tensor(found, name, models, base, weights, statistics, called, seed, config)


def check_trees(rule: Described, models: Sequence[Tree], base: Tree | None, weights: Sequence[float] | None, called: Sequence[str]) -> None:
    """Refuses what cannot be merged, before anything is.

    Raises:
        InputError: for no model, no base where one is needed, another number of weights than models, or names of tensors that are not the same.
    """
    name = rule.function.__name__
    if not models:
        raise InputError(f"{name}: there is no model to merge")
    if rule.needs_base and base is None:
        raise InputError(f"{name} merges differences from the base; give base=")
    if weights is not None and "weights" not in rule.given:
        raise InputError(f"{name} weighs models itself; leave weights out")
    if weights is not None and (len(weights) != len(models) or not all(torch.isfinite(torch.tensor(float(w))) for w in weights)):
        raise InputError(f"{name}: {len(weights)} weights {list(weights)} for {len(models)} models; give one finite number for each")
    first, others = (base, list(models)) if base is not None else (models[0], list(models[1:]))
    labels = list(called) if base is not None else list(called[1:])
    for label, tree in zip(labels, others, strict=True):
        missing, extra = [k for k in first if k not in tree], [k for k in tree if k not in first]
        if missing or extra:
            said = [f"lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"] if missing else []
            said += [f"has {', '.join(extra[:5])}{' ...' if len(extra) > 5 else ''} besides"] if extra else []
            raise InputError(f"{name}: {label} {' and '.join(said)}; models must hold the same tensors")


def merged_tensor(
    rule: Described, name: str, models: Sequence[Tree], base: Tree | None, weights: Sequence[float] | None,
    statistics: Sequence[Mapping[str, Any]] | None, called: Sequence[str], seed: int, config: Mapping[str, Any], copied: Callable[[int], None] = lambda i: None,
) -> Tensor:  # fmt: skip
    """One tensor of :func:`merge_tensors`, whose arguments have been checked; ``copied`` is told the number of each model that is no longer read."""
    own = [m[name] for m in models]
    still = None if base is None else base[name]
    first = own[0] if still is None else still
    for label, t in zip(called, own, strict=True):
        if t.shape != first.shape:
            raise InputError(f"{name}: {label} has shape {tuple(t.shape)}, the others {tuple(first.shape)}")
        if t.dtype != first.dtype:
            raise InputError(f"{name}: {label} is {t.dtype}, the others {first.dtype}; convert them to one type first")
    if not first.is_floating_point():
        apart = [label for label, t in zip(called, own, strict=True) if not torch.equal(t, first)]
        if apart:
            raise InputError(f"{name}: whole numbers that differ between models ({apart[0]}) cannot be merged")
        return first.clone()
    wide = torch.promote_types(first.dtype, torch.float32)
    start = None if still is None else still.to(wide)
    stacked = torch.empty((len(own), *first.shape), dtype=wide, device=first.device)
    for i, (row, t) in enumerate(zip(stacked, own, strict=True)):  # one after the other, the base taken away in place: with eight models every copy counts
        row.copy_(t)
        if rule.on_deltas:
            row.sub_(start)
        copied(i)
    if not is_finite(stacked):  # a look at all of them takes less time than one at each
        for label, t in zip(called, own, strict=True):
            if not is_finite(t):
                raise InputError(f"{name}: {label} holds NaN or infinity")
    given: dict[str, Any] = {"weights": None if weights is None else torch.tensor(weights, dtype=wide, device=first.device)}
    given |= {"base": start, "name": name, "generator": seeded(seed, name) if "generator" in rule.given else None}
    if "statistics" in rule.given:
        lacking = [label for label, s in zip(called, statistics or [{}] * len(own), strict=True) if name not in s]
        given["statistics"] = None if lacking else [s[name] for s in statistics or ()]
    merged = rule.function(stacked, **{k: given[k] for k in rule.given}, **config)
    if start is not None and rule.on_deltas:
        merged = start + merged
    return merged.to(first.dtype)


def is_finite(t: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; the extremes, which NaN passes through, tell so thirty times as fast as a look at every entry."""
    return not t.is_floating_point() or not t.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(t))).all())
