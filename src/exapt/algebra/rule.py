"""What a merge rule is: a typed function of one tensor of every model; its signature is its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from exapt.core.components import component, component_of
from exapt.core.errors import InputError, did_you_mean

F = TypeVar("F", bound=Callable[..., Tensor])
Streamed = Callable[..., Iterator[Tensor] | None]
"""A rule on parts: see :func:`rule`."""
GIVEN = ("weights", "base", "generator", "statistics", "name")
"""Parameters that the caller fills, where a rule has them: ``weights`` (m,); ``base``, the base's tensor, or ``None`` without one where that is its
default; ``generator``, seeded by the tensor's name; ``statistics``, one tensor or mapping of tensors for each model; the tensor's ``name``."""


def rule(
    key: str, paper: str = "", variants: Mapping[str, str] | None = None, oracle: str = "NumPy", entrywise: bool = False, streamed: Streamed | None = None
) -> Callable[[F], F]:
    """Returns a decorator that notes a merge rule in the catalogue.

    A rule's first parameter says what it is given, in at least single precision: ``deltas`` (m, ...), the m models' differences from the base,
    of which it returns the merged difference; or ``models`` (m, ...), the tensors themselves, of which it returns the merged one. Of the other
    parameters those named in :data:`GIVEN` are filled by the caller; the rest are keyword-only, have defaults, and are the configuration.
    ``entrywise`` declares that each entry of the result depends on the models' entries at its place alone, so that large tensors may be merged in parts.
    ``streamed`` is for a rule that is not, but needs only a few numbers of the whole tensors (thresholds, norms): the same rule with
    :class:`~exapt.algebra.streamed.Parts` in the place of its first parameter (and of ``base``, which they hold), that returns an iterator of merged parts in
    their order, or ``None`` for a configuration that needs whole tensors. A rule without either is given whole tensors.

    Raises:
        InputError: for a signature that is none of a rule.

    >>> @rule("largest_of_all")
    ... def largest_of_all(deltas: Tensor, *, factor: float = 1.0) -> Tensor:
    ...     "The entry that is largest in size."
    ...     return factor * deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
    >>> rule_of("largest_of_all").config
    {'factor': 1.0}
    """

    def note(function: F) -> F:
        described(function)
        function.entrywise, function.streamed = entrywise, streamed  # type: ignore[attr-defined]
        return component(key, kind="merge rule", paper=paper, variants=variants, oracle=oracle)(function)

    return note


@dataclass(frozen=True)
class Described:
    """A rule's signature.

    Attributes:
        function: The rule.
        on_deltas: Whether it is given differences from a base, which is then needed.
        given: Which of :data:`GIVEN` it takes.
        config: Its configuration, with the defaults.
        entrywise: Whether it says of itself that each entry depends on the models' entries at its place alone.
        streamed: The same rule on parts, if it has one.
    """

    function: Callable[..., Tensor]
    on_deltas: bool
    given: tuple[str, ...]
    config: Mapping[str, Any]
    entrywise: bool = False
    streamed: Streamed | None = None

    @property
    def needs_base(self) -> bool:
        """Whether there must be a base."""
        return self.on_deltas or ("base" in self.given and inspect.signature(self.function).parameters["base"].default is inspect.Parameter.empty)

    def checked(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration, after a look at its names.

        Raises:
            InputError: for a name that the rule does not have.
        """
        for name in config:
            if name not in self.config:
                raise InputError(
                    f'{self.function.__name__} has no "{name}"{did_you_mean(name, list(self.config))} (it has {", ".join(self.config) or "no settings"})'
                )
        return {**self.config, **config}


def described(function: Callable[..., Tensor]) -> Described:
    """Reads a rule's signature."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].name not in ("deltas", "models"):
        raise InputError(f'{function.__name__}: the first parameter of a merge rule is "deltas" or "models"')
    own = [p for p in parameters[1:] if p.name not in GIVEN]
    odd = [p.name for p in own if p.kind is not p.KEYWORD_ONLY or p.default is p.empty]
    if odd:
        raise InputError(f"{function.__name__}: {odd[0]} must be keyword-only and have a default, as all of a rule's configuration")
    given = tuple(p.name for p in parameters[1:] if p.name in GIVEN)
    entrywise, streamed = getattr(function, "entrywise", False), getattr(function, "streamed", None)
    return Described(function, parameters[0].name == "deltas", given, {p.name: p.default for p in own}, entrywise, streamed)


def rule_of(rule: str | Callable[..., Tensor]) -> Described:
    """The rule of a key, or a function that is one.

    Raises:
        InputError: for a key that is no rule's.
    """
    return described(component_of(rule, "merge rule") if isinstance(rule, str) else rule)
