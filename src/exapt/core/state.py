"""What a model remembers of its adapters: which there are, which act, which train, and what they ask of training."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from exapt.core.contract import Method, Taps, Tensors
from exapt.core.errors import InputError, did_you_mean
from exapt.core.layers import layers_of, walk
from exapt.core.rows import Rows
from exapt.core.slots import Slots, refresh, slots_of
from exapt.core.switching import Ready, ask, switch


@dataclass
class Adapter:
    """What a model remembers of one adapter."""

    name: str
    rules: list[tuple[Method, list[str]]]
    trainable: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class State:
    """What a model remembers of its adapters. One per model, reached from every adapted module."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    rows: Rows | None = None
    taps: dict[str, Taps] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    call: dict[str, Tensor] = field(default_factory=dict)
    carried: dict[tuple[str, int], dict[int, Any]] = field(default_factory=dict)
    grad: dict[str, bool] = field(default_factory=dict)
    nested: list[str] = field(default_factory=list)
    asking: set[str] = field(default_factory=set)
    again: bool = False
    ready: Ready = field(default_factory=Ready)


def state_of(model: nn.Module, make: bool = False) -> State:
    """Returns the model's state; with ``make`` starts one. Raises ``InputError`` if nothing is attached."""
    slots = model._modules.get("exapt")
    if isinstance(slots, Slots) and slots.is_root:
        return slots.state
    if not make:
        raise InputError("no adapter is attached to this model; call attach(model, method) first")
    modules = list(walk(model))
    if any("exapt" in m._modules for _, m in modules):
        raise InputError("a part of this model carries adapters already; detach them, then attach to the whole model")
    parameters = dict(model.named_parameters())
    nested = [n for n, m in modules if isinstance(m, nn.TransformerEncoder) and getattr(m, "use_nested_tensor", False)]
    for n in nested:  # nested tensors are for torch's fused layers alone
        cast(Any, model.get_submodule(n)).use_nested_tensor = False
    state = State(grad={n: p.requires_grad for n, p in parameters.items()}, nested=nested)
    refresh(model, slots_at(model, state, is_root=True))
    for p in parameters.values():
        p.requires_grad_(False)
    return state


def slots_at(module: nn.Module, state: State, is_root: bool = False) -> Slots:
    """The slots of a module, hung under it if need be."""
    found = module._modules.get("exapt")
    if isinstance(found, Slots):
        return found
    main = next((layer for layer in layers_of(module) if layer.parameter == "weight"), None)
    slots = Slots(state, type(module), main, is_root)
    module._modules["exapt"] = slots
    return slots


def start(model: nn.Module, name: str) -> State:
    """The model's state, made if need be, after checking that ``name`` can be given to an adapter."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f'adapter name "{name}": use letters, digits, _ and - only')
    if holds(model, name):
        raise InputError(f'an adapter "{name}" is attached already; give another name= or detach it first')
    state = state_of(model, make=True)
    state.ready.forget()
    state.asking.add(name)  # parameters ask for gradients until they are told not to
    return state


def holds(model: nn.Module, name: str) -> bool:
    """Whether an adapter of that name is attached."""
    slots = model._modules.get("exapt")
    return isinstance(slots, Slots) and name in slots.state.adapters


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the attached adapters."""
    slots = model._modules.get("exapt")
    return tuple(slots.state.adapters) if isinstance(slots, Slots) else ()


def activate(model: nn.Module, *names: str) -> None:
    """Makes exactly the named adapters active, in that order; none: the base model.

    Of the adapters' parameters only the active, trainable ones ask for gradients.

    Raises:
        InputError: for a name that is not attached.
    """
    state = state_of(model)
    for n in names:
        if n not in state.adapters:
            raise InputError(f'no adapter "{n}" on this model{did_you_mean(n, state.adapters)} (attached: {", ".join(state.adapters) or "none"})')
    set_active(model, names)
    set_gradients(model, names)


def set_active(model: nn.Module, names: Sequence[str]) -> None:
    """Brings every adapted module in line with the active adapters; gradients stay as they are."""
    switch(model, state_of(model), tuple(names))


def set_gradients(model: nn.Module, names: Sequence[str]) -> None:
    """Lets exactly the named adapters' parameters ask for gradients, if they are trainable."""
    ask(model, state_of(model), names)


@contextlib.contextmanager
def using(model: nn.Module, *names: str) -> Iterator[nn.Module]:
    """Within the block exactly the named adapters are active."""
    before = state_of(model).active
    activate(model, *names)
    try:
        yield model
    finally:
        activate(model, *before)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the base model runs alone."""
    with using(model):
        yield model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that ask for gradients, by their names in the model."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Count:
    """Numbers of parameters: those that train, and all, base and adapters together."""

    trainable: int
    total: int


def parameter_count(model: nn.Module) -> Count:
    """Counts trainable and all parameters; a packed 4-bit weight counts its unpacked entries."""
    total = trainable = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        n = int(state.shape.numel()) if state is not None else p.numel()
        total += n
        trainable += n if p.requires_grad else 0
    return Count(trainable, total)


def learning_rates(model: nn.Module) -> dict[int, float]:
    """Factors on the learning rate that the active adapters' methods ask for, by the identity of the parameter; 1 is left out."""
    found: dict[int, float] = {}
    for _, slots in slots_of(model):
        for e in slots.entries:
            factors = e.method.rates() if e.adapter in slots.state.active else {}
            if factors:
                found |= {id(p): float(factors[n]) for n, p in e.tensors().items() if factors.get(n, 1.0) != 1.0}
    return found


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of what the active adapters' methods add to the loss, or ``None``."""
    total: Tensor | None = None
    for module, slots in slots_of(model):
        for e in slots.entries:
            if e.adapter in slots.state.active and type(e.method).penalty is not Method.penalty:
                w = e.layer.to_matrix(cast(Tensor, module._parameters[e.layer.parameter])) if e.layer else torch.empty(0)
                term = e.method.penalty(e.tensors(), w)
                if term is not None:
                    total = term if total is None else total + term
    return total


def noted(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the active adapters' methods noted of their sites in the last call (a router's ``load`` and the like), by site, without their graph.

    >>> noted(nn.Linear(2, 2))
    {}
    """
    found: dict[str, dict[str, Tensor]] = {}
    for _, slots in slots_of(model):
        for e in slots.entries:
            if e.adapter in slots.state.active and e.notes:
                found.setdefault(e.site_name, {}).update({k: t.detach() for k, t in e.notes.items()})
    return found


def after_step(model: nn.Module, step: int, total: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Tells the active adapters' methods that optimiser step ``step`` (from 1) of ``total`` is done.

    Args:
        model: The adapted model.
        step: Which step, from 1.
        total: How many there will be.
        optimizer: Whose moments are to begin anew where a method began its parameters anew (a chain of LoRAs, regrown entries).
    """
    by_method: dict[tuple[str, Method], dict[str, Tensors]] = {}
    for _, slots in slots_of(model):
        for e in slots.entries:
            if e.adapter in slots.state.active and type(e.method).on_step is not Method.on_step:
                by_method.setdefault((e.adapter, e.method), {})[e.site_name] = e.tensors()
    with torch.no_grad():
        for (_, method), tensors in by_method.items():
            whole = {site: {k: _gathered(t) for k, t in p.items()} for site, p in tensors.items()}
            restarted = method.on_step(whole, step, total) or ()
            if optimizer is not None:
                own = {id(whole[site][k]): t for site, p in tensors.items() for k, t in p.items()}
                for t, index in restarted:
                    _restart(optimizer, own.get(id(t), t), index)
            for site, p in tensors.items():
                for k, t in p.items():
                    if whole[site][k] is not t:
                        _scatter(t, whole[site][k])


def _restart(optimizer: torch.optim.Optimizer, parameter: Tensor, index: Tensor | None) -> None:
    """Lets an optimiser forget what it kept of a parameter, or of some entries of it."""
    if index is None:
        optimizer.state.pop(parameter, None)  # type: ignore[call-overload]
        return
    for kept in optimizer.state.get(parameter, {}).values():  # type: ignore[call-overload]
        if isinstance(kept, Tensor) and kept.shape == parameter.shape:
            kept.view(-1)[index] = 0


def _gathered(t: Tensor) -> Tensor:
    """A sharded tensor whole, with its gradient; other tensors themselves."""
    if not hasattr(t, "full_tensor"):
        return t
    whole = cast(Any, t).full_tensor()
    whole.grad = None if t.grad is None else cast(Any, t.grad).full_tensor()
    return cast(Tensor, whole)


def _scatter(t: Any, whole: Tensor) -> None:
    """Writes a whole tensor back into the shards of ``t``."""
    from torch.distributed.tensor import distribute_tensor

    t.copy_(distribute_tensor(whole.detach(), t.device_mesh, t.placements))
