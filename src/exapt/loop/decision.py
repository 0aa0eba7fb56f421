"""What the loop says of a batch, and what it remembers between batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exapt.loop.decide import Held
from exapt.loop.policy import Policy
from exapt.loop.rows import batch_from, packed, tensors_of, unpacked
from exapt.loop.runner import Names


@dataclass
class Decision:
    """What was done about one batch, or at one request, and why.

    Attributes:
        id: Its number, from 1.
        key: The batch's; ``None`` for what was no batch (a rollback).
        action: "none", "collect" (the alarm rang; rows are gathered), "promote", "revert" (to the frozen model), "keep" (no candidate was better),
            "ask" (for labels), "rollback", "refused" (rows that cannot be used) or "degraded" (the store cannot be written).
        reason: Why, in one line.
        kind: The diagnosis, where one was made: "none", "label", "covariate", "label+covariate", "novel", "unknown".
        p_values, evidence: What it rests on.
        alarm: ``log_wealth``, ``threshold``, ``p_value``, ``rows``, ``by``, and whether it ``rang``.
        estimate: Accuracy of what serves on the batch: ``value``, ``low``, ``high``, ``known``; ``None`` where none can be made.
        candidates: Each with its estimate, tests, failures and evidence.
        ask: Keys and rows whose labels are asked for.
        serving: Names of the loop's adapters that serve from now on.
        rows, predictions: Number of rows, and the classes answered.
        notes: What else happened: rows left out, fallbacks.
        seconds: How long it took.
    """

    id: int
    key: str | None
    action: str = "none"
    reason: str = ""
    kind: str | None = None
    p_values: dict[str, float] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    alarm: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    ask: list[list[Any]] = field(default_factory=list)
    serving: list[str] = field(default_factory=list)
    rows: int = 0
    predictions: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The answer to a batch: ``logits`` (n, classes) on the CPU (``None`` where the model could make none), and the decision.

    ``repeated``: the batch had been processed before, and this is what was said then.
    """

    logits: Tensor | None
    decision: Decision
    repeated: bool = False

    @property
    def predictions(self) -> Tensor:
        """The most probable classes (n,)."""
        return torch.zeros(0, dtype=torch.long) if self.logits is None else self.logits.argmax(-1)


@dataclass
class Now:
    """What the loop knows, apart from the alarm: all of it is in the store after every batch."""

    version: int = 0
    count: int = 0
    phase: str = "watch"
    serving: Names = ()
    twin: Tensor | None = None
    prior: list[float] | None = None
    promoted: int = 0
    kind: str = "none"
    used: int = 0
    found: str = "none"
    held: tuple[Held, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON, without the rows."""
        own = {"prior": self.prior, "promoted": self.promoted, "kind": self.kind, "used": self.used, "found": self.found}
        return {"count": self.count, "phase": self.phase, "serving": list(self.serving), **own}


def twin_key(names: Names) -> str:
    """Under which name the store keeps the logits of a :class:`exapt.loop.verify.Judged` twin."""
    return f"twin of {'+'.join(names)}"


def row_bytes(h: Held) -> bytes:
    """Rows as the store keeps them."""
    return packed({**tensors_of(h.batch), "ids": torch.tensor(h.ids)})


def held_from(number: int, key: str, data: bytes, device: torch.device) -> Held:
    """The rows that :func:`row_bytes` wrote."""
    tensors = unpacked(data)
    return Held(number, key, tuple(tensors.pop("ids").tolist()), batch_from({k: t.to(device) for k, t in tensors.items()}))


def policy_text(policy: Policy) -> str:
    """A policy in one line: what differs from the defaults."""
    default = Policy().as_dict()
    return ", ".join(f"{k}={v}" for k, v in policy.as_dict().items() if v != default[k]) or "default"


def shapes_text(found: Mapping[str, tuple[Any, ...]]) -> str:
    """Shapes of rows, in words."""
    return ", ".join(f"{tuple(v[1:])} {v[0]}" if v[0] == "float" else f"{v[1]}-dimensional {v[0]}" for v in found.values())
