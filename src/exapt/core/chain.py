"""The active entries of one module, sorted by how they act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exapt.core.contract import ActivationMethod, TokenMethod
from exapt.core.entry import Entry


@dataclass(frozen=True)
class Chain:
    """The active entries of one module, sorted by how they act."""

    inner: tuple[Entry, ...] = ()
    fast: tuple[Entry, ...] = ()
    after: tuple[Entry, ...] = ()
    tokens: tuple[Entry, ...] = ()
    sides: tuple[Entry, ...] = ()
    prefixes: tuple[Entry, ...] = ()
    entering: tuple[bool, ...] = ()
    """Of each entry in ``after``: whether it changes the input too."""
    overrides: tuple[str, ...] = ()
    lane: Entry | None = None
    """The entry, where a fast path of one adapter is all there is."""


EMPTY = Chain()


def sorted_chain(entries: list[Entry], aliases: list[Any]) -> Chain:
    """The chain of entries in their order, at a module with ``aliases`` of tied parameters."""
    weights = [e for e in entries if e.names()]
    cut = max((i + 1 for i, e in enumerate(weights) if e.definition), default=0)
    inner, fast = tuple(weights[:cut]), tuple(weights[cut:])
    tokens = tuple(e for e in entries if isinstance(e.method, TokenMethod))
    alone = len(entries) == len(fast) == 1 and entries[0].layer is not None and entries[0].layer.kind != "embedding"
    after = tuple(e for e in entries if e.method.contract in ("activation", "output"))
    return Chain(
        inner, fast, after,
        tuple(e for e in tokens if e.method.level == "input"),
        tuple(e for e in entries if e.method.contract == "side"),
        tuple(e for e in tokens if e.method.level == "attention"),
        tuple(isinstance(e.method, ActivationMethod) and type(e.method).enter is not ActivationMethod.enter for e in after),
        tuple(sorted({n for e in inner for n in e.names()} | {own for own, _ in aliases})),
        entries[0] if alone and not aliases else None,
    )  # fmt: skip
