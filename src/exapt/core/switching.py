"""Switching between adapters: what a choice of active adapters makes of the model's modules, prepared once and then only put in place.

A switch touches the modules of the adapters that leave or come, and their parameters, however many others are resident.
"""

from __future__ import annotations

from collections.abc import Iterable, ValuesView
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from exapt.core.chain import Chain
from exapt.core.errors import InputError
from exapt.core.rows import Rows
from exapt.core.slots import Slots, fit, slots_of

if TYPE_CHECKING:
    from exapt.core.state import State

Places = tuple[tuple[dict[str, Any], Chain], ...]
MOST = 4096
"""Choices of adapters kept ready."""


@dataclass(eq=False)
class Choice:
    """What one choice of adapters changes: modules that only take another chain (their slots' attributes, the chain; and the chain that they
    have without), and modules that change their class too."""

    places: Places
    rest: Places
    special: tuple[tuple[nn.Module, Slots], ...]
    where: frozenset[int]
    reads: tuple[str, ...]


class Ready:
    """What is prepared for switching. A copy of the model, or a pickle, begins without."""

    def __init__(self) -> None:
        self.choices: dict[tuple[str, ...], Choice] = {}
        self.now: Choice | None = None
        self.modules: list[tuple[nn.Module, Slots]] = []
        self.held: dict[str, list[ValuesView[Tensor]]] = {}
        self.where: dict[frozenset[int], frozenset[int]] = {}
        self.rows: dict[tuple[str | None, ...], Rows] = {}
        self.apart: dict[str | None, bool] = {}
        self.counted = 0

    def forget(self) -> None:
        """Begins anew, because an adapter comes or goes."""
        for rows in self.rows.values():
            for r in (rows, rows.rest):
                if r is not None:
                    r.plans.clear()  # a block that is under way plans anew
        for _, slots in self.modules:
            slots.__dict__.update(stack=None, pool=None)
            slots.kept.clear()
        if self.modules or self.now is not None:
            self.choices, self.now, self.modules, self.held, self.where, self.rows, self.apart = {}, None, [], {}, {}, {}, {}

    def __deepcopy__(self, memo: Any) -> Ready:
        return Ready()

    def __reduce__(self) -> tuple[type[Ready], tuple[()]]:
        return Ready, ()


def switch(model: nn.Module, state: State, names: tuple[str, ...]) -> None:
    """Makes ``names`` the active adapters."""
    ready = state.ready
    new, now, before = ready.choices.get(names), ready.now, state.active
    state.active = names
    state.call.clear()
    try:
        if new is None or now is None:
            new = _prepared(model, state, names)
        else:
            if now.where is not new.where:
                for own, without in now.rest:
                    own["chain"] = without
            for own, with_it in new.places:
                own["chain"] = with_it
            for module, slots in (*now.special, *new.special):
                fit(module, slots)
    except InputError:
        state.active = before
        for module, slots in ready.modules:
            fit(module, slots)
        raise
    state.reads = new.reads
    ready.now = new


def _prepared(model: nn.Module, state: State, names: tuple[str, ...]) -> Choice:
    """Brings every adapted module in line with ``names``, and notes what that was."""
    ready = state.ready
    ready.modules = ready.modules or list(slots_of(model))
    places, rest, special = [], [], []
    for module, slots in ready.modules:
        fit(module, slots)
        full, bare = slots.chain, slots.chain_of(())
        if full.prefixes or full.overrides != bare.overrides:
            special.append((module, slots))
        elif full is not bare:
            places.append((slots.__dict__, full))
            rest.append((slots.__dict__, bare))
    where = frozenset(id(own) for own, _ in places)
    _note_reads(state, names)
    reads = tuple({r: None for n in names for m, _ in state.adapters[n].rules for r in m.reads})
    choice = Choice(tuple(places), tuple(rest), tuple(special), ready.where.setdefault(where, where), reads)
    if len(ready.choices) >= MOST:
        del ready.choices[next(iter(ready.choices))]
    ready.choices[names] = choice
    return choice


def _note_reads(state: State, names: tuple[str, ...]) -> None:
    """Keeps up what a call may hold for any adapter there is; an adapter that comes is activated, so only one that went asks for a full count."""
    ready = state.ready
    whole = not ready.counted or len(state.adapters) < ready.counted
    reads: Iterable[str] = () if whole else state.known
    state.known = tuple(dict.fromkeys([*reads, *(r for n in (state.adapters if whole else names) for m, _ in state.adapters[n].rules for r in m.reads)]))
    ready.counted = len(state.adapters)


def ask(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Lets exactly the parameters of the trainable ones among ``names`` ask for gradients."""
    wanted = {n for n in names if state.adapters[n].trainable}
    for name in state.asking - wanted:
        _set(model, state, name, False)
    for name in wanted:
        _set(model, state, name, True)
    state.asking = wanted


def _set(model: nn.Module, state: State, name: str, asks: bool) -> None:
    for p in chain.from_iterable(state.ready.held.get(name) or _held(model, state, name)):
        p.requires_grad = asks  # reading it first would cost as much


def _held(model: nn.Module, state: State, name: str) -> list[ValuesView[Tensor]]:
    """The adapter's parameters, by living views of what their holders keep, since sharding and moving replace them."""
    ready = state.ready
    ready.modules = ready.modules or list(slots_of(model))
    held = (h for _, slots in ready.modules for e in slots.of(name) for h in (e.holder, e.common))
    holders = dict.fromkeys(h for h in held if h is not None and h._parameters)  # in their order, which is that of memory
    ready.held[name] = [cast("dict[str, Tensor]", h._parameters).values() for h in holders]
    return ready.held[name]
