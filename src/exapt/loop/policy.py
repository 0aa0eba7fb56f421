"""What the loop may do, and when: numbers and names that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from exapt.core.errors import InputError, did_you_mean

REMEDIES = ("prior_correction", "norm_statistics", "test_time", "objective")


@dataclass(frozen=True)
class Policy:
    """Settings of :class:`exapt.Loop`.

    Args:
        alpha: Probability of ever a false alarm between two decisions, at most.
        level: Significance of the diagnosis, and one less the coverage of the intervals.
        rows: Rows gathered after an alarm before they are diagnosed; four times as many recent rows are kept.
        recheck: While an adapter serves, diagnose so many recent rows with every batch and decide anew where they show another kind of shift, and
            again when there are twice and four times as many rows to adapt to.
        verify: Share of them that no remedy sees, by which remedies are judged.
        margin: By how much a candidate's estimated accuracy must exceed that of what serves.
        errors: How many standard errors the gain must be, besides.
        remedies: What may be tried: ``"prior_correction"``, ``"norm_statistics"``, ``"test_time"`` and ``"objective"``.
        test_time: Test-time methods by key, for ``"test_time"``.
        objectives: Objectives by key, for ``"objective"``; they train on the reference and the buffer.
        method: The method that objectives train, by key; its sites are its own choice.
        steps: Optimiser steps under an objective.
        passes: Passes of a test-time method over its rows.
        batch: Rows of a batch while adapting.
        chunk: Rows that the model runs at once, at most.
        bins: Score streams of class probabilities, at most; more classes are added up in groups.
        collapse: A candidate whose predictions spread over less than this share of the expected number of classes has collapsed.
        entropy: A candidate whose mean entropy falls below this share of that on the reference has collapsed.
        labels: Labelled rows from which on labels and not estimates decide.
        ask: Rows to ask labels for, at most.
        draws: Bootstrap replicates of an interval.
        seconds: Time for one decision; candidates not begun by then are left out, and said to be. ``None``: no limit. With a limit a run
            is not repeatable bit for bit.

    Raises:
        InputError: for a value out of its range.

    >>> Policy.from_dict({"alpha": 0.01}).alpha
    0.01
    """

    alpha: float = 0.05
    level: float = 0.05
    rows: int = 128
    recheck: bool = True
    verify: float = 0.5
    margin: float = 0.01
    errors: float = 1.0
    remedies: tuple[str, ...] = REMEDIES
    test_time: tuple[str, ...] = ("tent",)
    objectives: tuple[str, ...] = ()
    method: str = "lora"
    steps: int = 50
    passes: int = 1
    batch: int = 32
    chunk: int = 256
    bins: int = 10
    collapse: float = 0.4
    entropy: float = 0.1
    labels: int = 20
    ask: int = 16
    draws: int = 40
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("remedies", "test_time", "objectives"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        odd = [r for r in self.remedies if r not in REMEDIES]
        if odd:
            raise InputError(f'policy.remedies: no remedy "{odd[0]}"{did_you_mean(odd[0], REMEDIES)} (there are {", ".join(REMEDIES)})')
        for name in ("alpha", "level", "verify"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"policy.{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name in ("rows", "steps", "passes", "batch", "chunk", "bins", "labels", "ask"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"policy.{name} is {getattr(self, name)!r}; it must be a whole number of at least 1")
        if self.rows < 40:
            raise InputError(f"policy.rows is {self.rows}; a diagnosis and its verification need at least 40")

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """Returns the policy that :meth:`as_dict` described; what is left out has its default."""
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise InputError(f'a policy has no "{name}"{did_you_mean(name, known)} (it has {", ".join(known)})')
        return cls(**data)
