"""Taking adapters off a model, whole or half hung."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

from exapt.core.entry import Entry
from exapt.core.slots import Slots, refresh, slots_of
from exapt.core.state import State

_SHARED = re.compile(r"(.+)_shared_\d+")


def remove(model: nn.Module, names: str | Iterable[str], state: State) -> None:
    """Takes adapters off, whole or half hung, in one pass; with the last one the model is what it was."""
    gone = {names} if isinstance(names, str) else set(names)
    root = cast(Slots, model._modules["exapt"])
    sites_own = {id(e.holder) for e in root.entries}
    for key in [k for k, m in root._modules.items() if (hit := _SHARED.fullmatch(k)) and hit[1] in gone and id(m) not in sites_own]:
        del root._modules[key]
    touched = list(slots_of(model))
    for _, slots in touched:
        leaving = [e for n in gone for e in slots.of(n)]
        if not leaving:
            continue
        for e in leaving:
            if e.source is not None:
                e.source.watchers -= 1
        for key in [_key(slots, e) for e in leaving]:
            slots._modules.pop(key, None)
        _drop(slots, leaving)
    for _, slots in touched:
        if slots.aliases:
            kept = [a for a in slots.aliases if cast(Slots, a[1][0]._modules["exapt"]).entries]
            if len(kept) < len(slots.aliases):
                slots.aliases = kept
                slots.chains.clear()
    for n in gone:
        state.adapters.pop(n, None)
    state.active = tuple(n for n in state.active if n not in gone)
    last = not state.adapters
    root.is_root = not last
    for module, slots in touched:
        refresh(module, slots)
    if last:
        for n, p in model.named_parameters():
            p.requires_grad_(state.grad.get(n, p.requires_grad))
        for n in state.nested:
            cast(Any, model.get_submodule(n)).use_nested_tensor = True


def _key(slots: Slots, e: Entry) -> str:
    """The name under which :func:`exapt.core.attach.hang` put an entry's tensors, found without a look at those of other adapters."""
    for key in (e.adapter, f"{e.adapter}_{e.layer.parameter}" if e.layer else e.adapter):
        while key in slots._modules:
            if slots._modules[key] is e.holder:
                return key
            key += "_"
    return next((k for k, m in slots._modules.items() if m is e.holder), "")


def _drop(slots: Slots, leaving: Sequence[Entry]) -> None:
    """Takes entries off a module's list, and off the index of it by adapter, without a look at those of other adapters.

    In place: a copy of the list would touch every one of them.
    """
    entries, index = slots.entries, slots.named[2]
    for e in leaving:
        del entries[next(i for i in range(len(entries) - 1, -1, -1) if entries[i] is e)]  # by identity, from the end: most often the newest goes
        index.pop(e.adapter, None)
    slots.__dict__["named"] = (entries, len(entries), index)
    slots.chains.clear()
