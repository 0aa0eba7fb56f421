"""Merging: write a shift into the base's own parameters, restore classes and keys, and take it back bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from exapt.core.attach import detach, hang, tied, uncollected
from exapt.core.contract import ActivationMethod, Method
from exapt.core.entry import Entry, Holder, chosen_of
from exapt.core.errors import InputError
from exapt.core.file import holders
from exapt.core.layers import is_quantised, walk
from exapt.core.roles import is_leaf
from exapt.core.sites import Site, Sites, sites
from exapt.core.slots import Slots
from exapt.core.state import Adapter, activate, holds, start, state_of

_RECORD = "_exapt_merged"


@dataclass
class _Merged:
    """What :func:`unmerge` needs: the base's parameters and the adapters' tensors as they were."""

    names: tuple[str, ...]
    originals: dict[str, Tensor] | None
    adapters: list[tuple[Adapter, dict[str, Holder]]]
    active: tuple[str, ...]


class _Kept:
    """Takes an adapter's tensors from before the merge."""

    def __init__(self, holders: dict[str, Holder]) -> None:
        self.holders = holders

    def shared(self, number: int, method: Method, chosen: Sites) -> Holder | None:
        """As :meth:`exapt.core.attach.Fresh.shared`."""
        return self.holders.get(f"{number}:*")

    def site(self, number: int, method: Method, site: Site) -> tuple[Holder, dict[str, str]]:
        """As :meth:`exapt.core.attach.Fresh.site`."""
        holder = self.holders[f"{number}:{site.name}"]
        return holder, chosen_of(holder.tensors()) if method.contract == "subset" else {}


def merged(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters merged into ``model`` (and not unmerged)."""
    record = model.__dict__.get(_RECORD)
    return record.names if record else ()


def merge(model: nn.Module, *names: str, undo: bool = True) -> nn.Module:
    """Writes adapters into the base's parameters and removes them; keys, classes and outputs stay.

    Args:
        model: The adapted model.
        names: Adapters, in the order they act; by default the active ones.
        undo: Keep the original parameters and the adapters so that :func:`unmerge` can restore both (costs their memory).

    Returns:
        ``model`` itself.

    Raises:
        InputError: if something is merged already, a method has no merged form, or a weight is quantised. Nothing is
            changed then.

    >>> import exapt
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> type(merge(exapt.attach(model, exapt.LoRA(rank=1), where="all"))[0]).__name__
    'Linear'
    """
    if merged(model):
        raise InputError(f"{', '.join(merged(model))} is merged already; unmerge first (merging twice would add it twice)")
    state = state_of(model)
    names = names or state.active
    if not names:
        raise InputError("no adapter is active; name the adapters to merge")
    for n in names:
        if n not in state.adapters:
            raise InputError(f'no adapter "{n}" on this model (attached: {", ".join(state.adapters)})')
        refuse_unmergeable(state.adapters[n])
    new = new_values(model, names)
    originals: dict[str, Tensor] = {}
    for path, (parameter, value) in new.items():
        if undo:
            originals[path] = parameter.data
        # the new values take the old ones' place instead of being copied over them: half the memory traffic, same parameter
        parameter.data = _own(value).to(parameter.dtype).contiguous()
    kept = [(state.adapters[n], dict(holders(model, n))) for n in names] if undo else []
    record = _Merged(tuple(names), originals if undo else None, kept, state.active)
    detach(model, *names)
    model.__dict__[_RECORD] = record
    return model


def refuse_unmergeable(adapter: Adapter) -> None:
    """Raises ``InputError`` where a method of the adapter has no merged form."""
    for method, where in adapter.rules:
        if not method.mergeable:
            raise InputError(
                f'adapter "{adapter.name}": {method.key} has no merged form (it acts on {method.contract}s, '
                f"at {where[0] or 'the model'}); keep it attached, or save it"
            )


@torch.no_grad()
def new_values(model: nn.Module, names: tuple[str, ...]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Every parameter that merging ``names`` would change, by its path: the stored one and its new value. Nothing is changed."""
    new: dict[str, tuple[nn.Parameter, Tensor]] = {}
    shared = tied(model)
    for path, module in walk(model):
        slots = module._modules.get("exapt")
        if not isinstance(slots, Slots):
            continue
        entries = [e for n in names for e in slots.of(n)]
        values: dict[str, Tensor] = {}
        for e in entries:
            if any(is_quantised(p) for name in e.names() if (p := module._parameters.get(name)) is not None):
                raise InputError(f"{e.site_name}: its weight is quantised and cannot take a merge; load the base unquantised to merge")
            for parameter in reversed(e.names()):  # the bias first: it may read the weight from before
                stored = module._parameters.get(parameter)
                if stored is None:
                    continue
                _exact(e, parameter, values, stored, module)
            if isinstance(e.method, ActivationMethod):
                if any(id(p) in shared for p in module._parameters.values()):
                    raise InputError(f"{e.site_name}: its weight is tied to another module, which would take {e.method.key}'s change too; keep it attached")
                _fold(e, module, values)
        for parameter, value in values.items():
            full = f"{path}.{parameter}" if path else parameter
            value = value.to(cast(Tensor, module._parameters[parameter]).dtype)  # before the check: a half may overflow only here
            if not (torch.isfinite(value.sum()) or torch.isfinite(value).all()):  # the sum is finite only if all are, and one pass
                raise InputError(f"{full}: merging would write NaN or infinity; check the adapter")
            new[full] = (cast(nn.Parameter, module._parameters[parameter]), value)
    return new


def _own(value: Tensor) -> Tensor:
    """The values without their graph, and not an adapter's own tensor."""
    return value.detach().clone() if isinstance(value, nn.Parameter) else value.detach()


def _exact(e: Entry, parameter: str, values: dict[str, Tensor], stored: Tensor, module: nn.Module) -> None:
    """Applies one entry's definition in at least single precision, so that rounding happens once."""

    def wide(name: str, stored: Tensor) -> Tensor:
        value = values.get(name, stored)
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

    def matrix() -> Tensor:
        return e.layer.to_matrix(wide(e.layer.parameter, cast(Tensor, module._parameters[e.layer.parameter])))  # type: ignore[union-attr]

    values[parameter] = e.changed(parameter, wide(parameter, stored), matrix)


def _fold(e: Entry, module: nn.Module, values: dict[str, Tensor]) -> None:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or not is_leaf(module):
        raise InputError(f"{e.site_name}: {e.method.key} folds into a layer with a weight of its own, not a composite module; attach it to layers to merge")
    layer = e.layer
    w = values.get("weight", weight)
    b = values.get("bias", bias) if bias is not None else None
    matrix = layer.to_matrix(w) if layer else w.reshape(-1, 1)
    new_w, new_b = e.method.fold(e.tensors(), matrix.float() if matrix.dtype.itemsize < 4 else matrix, b)
    if new_b is not None and bias is None:
        if layer is None or layer.kind != "embedding":
            raise InputError(f"{e.site_name}: the layer has no bias to take {e.method.key}'s shift; merging would add a key")
        new_w = new_w + new_b[:, None]
        new_b = None
    values["weight"] = layer.from_matrix(new_w) if layer else new_w.reshape(w.shape)
    if new_b is not None:
        values["bias"] = new_b


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Takes a merge back: the base's parameters are what they were, bit for bit, and the adapters are attached again.

    Raises:
        InputError: if nothing was merged, or ``undo=False`` was given.
    """
    record: Any = model.__dict__.get(_RECORD)
    if record is None:
        raise InputError("nothing was merged into this model, so there is nothing to unmerge")
    if record.originals is None:
        raise InputError("the model was merged with undo=False, which keeps no originals; load the base again")
    for n in record.names:
        if holds(model, n):
            raise InputError(f'an adapter "{n}" was attached since the merge; detach it, so that the merged one can return')
    modules = dict(walk(model))
    for path, value in record.originals.items():
        place, _, parameter = path.rpartition(".")
        cast(nn.Parameter, modules[place]._parameters[parameter]).data = value
    del model.__dict__[_RECORD]
    with uncollected():
        found = {s.name: s for s in sites(model)}
        for adapter, tensors in record.adapters:
            state = start(model, adapter.name)
            hang(model, state, adapter.name, [(m, Sites(found[w] for w in where)) for m, where in adapter.rules], _Kept(tensors))
            state.adapters[adapter.name] = adapter
    activate(model, *(n for n in record.active if holds(model, n)))  # others may have been detached since
    return model
