"""A merge rule used inside another one, in coordinates other than the matrix's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from exapt.algebra.rule import rule_of
from exapt.core.errors import InputError


def inner_rule(
    rule: str | Callable[..., Tensor], settings: Mapping[str, Any] | None, within: str, weights: Tensor | None = None,
    generator: torch.Generator | None = None, name: str = "",
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """Binds all of a rule but its first parameter.

    Args:
        rule: A rule, or its key; one that is written for models gets the differences instead.
        settings: Its configuration.
        within: What messages call the outer rule.
        weights: (m,).
        generator: Of a rule that draws.
        name: The tensor's.

    Raises:
        InputError: for a rule that needs the base's tensor or statistics of the models, which have no meaning in other coordinates.
    """
    found = rule_of(rule)
    config = found.checked(settings or {})
    needed = [k for k in found.given if k in ("base", "statistics")]
    if needed:
        raise InputError(f"{within}: {found.function.__name__} needs the {needed[0]} of the tensor itself; choose a rule of differences alone")
    given = {"weights": weights, "generator": generator, "name": name}
    more = {k: given[k] for k in found.given} | config

    def bound(stacked: Tensor) -> Tensor:
        return found.function(stacked, **more)

    return bound
