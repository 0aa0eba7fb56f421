"""What hangs under an adapted module, and how its forward runs: once, for every method and every kind of layer.

An adapted module keeps its identity: ``__class__`` becomes a cached subclass of its own class, and one child module,
``exapt``, holds the adapters' tensors. A method without a fast path, or on a parameter that its module reads itself, acts
through a property over that parameter; the others act in ``forward``.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from exapt.core.attention import block_mask, config_property, prefixed_config, prefixed_multihead, run_prompted
from exapt.core.base import Base, plain
from exapt.core.chain import EMPTY, sorted_chain
from exapt.core.chain import Chain as Chain
from exapt.core.contract import ActivationMethod, Taps
from exapt.core.entry import Entry
from exapt.core.errors import InputError
from exapt.core.kept import Kept
from exapt.core.layers import Layer, packed, walk
from exapt.core.prompts import cached_length
from exapt.core.routing import run_rows

if TYPE_CHECKING:
    from exapt.core.rows import Stack
    from exapt.core.state import State

MOST = 4096
"""Chains that a module keeps."""


class Slots(nn.Module):
    """The child named ``exapt`` of an adapted module."""

    state: State
    is_root: bool
    base_class: type[nn.Module]
    _main_layer: Layer | None
    entries: list[Entry]
    aliases: list[tuple[str, tuple[nn.Module, str]]]
    chain: Chain
    chains: dict[tuple[str, ...], Chain]
    watchers: int
    seen: Tensor | None
    hook: Any
    config: Any
    takes: tuple[tuple[str, ...], bool] | None
    named: tuple[list[Entry], int, dict[str, list[Entry]]]
    stack: Stack | None
    pool: Stack | None
    kept: Kept

    def __init__(self, state: State, base_class: type[nn.Module], layer: Layer | None, is_root: bool = False) -> None:
        super().__init__()
        self.__dict__.update(  # not one by one: nn.Module's __setattr__ looks through every register each time
            state=state, is_root=is_root, base_class=base_class, _main_layer=layer, entries=[], aliases=[], chain=EMPTY, chains={},
            watchers=0, seen=None, hook=None, config=None, takes=None, named=([], 0, {}), stack=None, pool=None, kept=Kept(),
        )  # fmt: skip

    @property
    def layer(self) -> Layer:
        assert self._main_layer is not None
        return self._main_layer

    def frozen_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The base class's forward; where a definition acts on a quantised weight, or its kernel has no gradient, the layer's plain operation."""
        if self._main_layer is not None and self._main_layer.kind == "linear":
            stored = module._parameters["weight"]
            if stored is not None and ((self.chain.inner and plain(stored) is not stored) or (packed(stored) and first_tensor(args, kwargs).requires_grad)):
                bias = self.value(module, "bias") if module._parameters.get("bias") is not None else None
                x = first_tensor(args, kwargs)
                return nn.functional.linear(x, plain(self.value(module, "weight")).to(x.dtype), bias)
        return self.base_class.forward(module, *args, **kwargs)

    def value(self, module: nn.Module, name: str, entries: Sequence[Entry] | None = None) -> Tensor:
        """The effective value of a stored parameter under the inner (or given) entries."""
        stored = module._parameters[name]
        for own, (owner, owners_name) in self.aliases:
            if own == name:
                slots = cast(Slots, owner._modules["exapt"])
                stored = cast(nn.Parameter, slots.value(owner, owners_name, slots.chain.inner + slots.chain.fast))
        value = cast(Tensor, stored)
        chosen = self.chain.inner if entries is None else entries
        for i, e in enumerate(chosen):
            if name in e.names():
                value = e.changed(name, plain(value), functools.partial(self._matrix_below, module, e, chosen[:i]))
        return value

    def _matrix_below(self, module: nn.Module, e: Entry, entries: Sequence[Entry]) -> Tensor:
        """The matrix that ``e`` changes, under the entries before it."""
        assert e.layer is not None
        return e.layer.to_matrix(plain(self.value(module, e.layer.parameter, entries)))

    def matrix(self, module: nn.Module, entries: tuple[Entry, ...]) -> Tensor:
        return self.layer.to_matrix(plain(self.value(module, self.layer.parameter, self.chain.inner + entries)))

    def bias(self, module: nn.Module, entries: tuple[Entry, ...]) -> Tensor | None:
        name = self.layer.bias
        if name is None or module._parameters.get(name) is None:
            return None
        return self.value(module, name, self.chain.inner + entries)

    def of(self, name: str) -> Sequence[Entry]:
        """The entries of one adapter, without a walk over the others: they are appended, and who takes any out keeps the index up."""
        entries, count, found = self.named
        if entries is not self.entries or count != len(entries):
            if entries is not self.entries:
                entries, count, found = self.entries, 0, {}
            for e in entries[count:]:
                found.setdefault(e.adapter, []).append(e)
            self.__dict__["named"] = (entries, len(entries), found)
        return found.get(name, ())

    def chain_of(self, names: tuple[str, ...]) -> Chain:
        """The chain of the adapters ``names``, in that order."""
        found = self.chains.get(names)
        if found is None:
            entries = [e for n in names for e in self.of(n)]
            if not entries:
                return self.chains.setdefault((), sorted_chain([], self.aliases)) if self.aliases else EMPTY
            if len(self.chains) >= MOST:
                self.chains.clear()
            found = self.chains[names] = sorted_chain(entries, self.aliases)
        return found

    def run(self, module: nn.Module, chain: Chain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward with the entries of ``chain`` in effect."""
        if chain.lane is not None and len(args) == 1 and not (kwargs or self.is_root or self.watchers):
            return chain.lane.forward(args[0], Base(module, self, (), ((), kwargs)))
        if self.is_root and self.state.known:
            args, kwargs = _note_call(self, module, args, kwargs)
        if self.watchers or chain.prefixes:
            self.seen = first_tensor(args, kwargs)
        inputs: list[Tensor] = []  # what each entry takes for the module's input: the last one stands outermost
        for e, enters in zip(reversed(chain.after), reversed(chain.entering), strict=True):  # flags, since identities would bind a compiled graph
            if enters:
                args, kwargs = _entered(e, args, kwargs)
            inputs.append(first_tensor(args, kwargs))
        if chain.sides:
            y = _run_sides(self, module, chain, args, kwargs)
        elif chain.tokens and self.is_root:
            y = run_prompted(self, module, chain, args, kwargs)
        elif chain.prefixes and isinstance(module, nn.MultiheadAttention):
            y = prefixed_multihead(module, chain.prefixes, args, kwargs)
        elif chain.fast:
            y = Base(module, self, chain.fast, (args[1:], kwargs))(args[0]) if args else _by_keyword(self, module, chain, kwargs)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                y = torch.where(first_tensor(args, kwargs).eq(module.padding_idx)[..., None], y.detach(), y)  # padding takes no gradient
        else:
            y = self.frozen_forward(module, *args, **kwargs)
        for e in chain.tokens if not self.is_root else ():
            y = replace_first(y, lambda h, e=e: e.method.extend(e.tensors(h.dtype), h)[0])  # type: ignore[misc]
        for e, own in zip(chain.after, reversed(inputs), strict=True):
            x = own if e.source is None else cast(Tensor, e.source.seen)
            y = replace_first(y, lambda h, e=e, x=x: activation(e, x, h))  # type: ignore[misc]
        if chain.prefixes and not self.watchers:
            self.seen = None
        if self.is_root and self.state.carried:
            self.state.carried.clear()
        return y


def _by_keyword(slots: Slots, module: nn.Module, chain: Chain, kwargs: dict[str, Any]) -> Tensor:
    name = next(iter(kwargs))
    rest = {k: v for k, v in kwargs.items() if k != name}
    return Base(module, slots, chain.fast, ((), rest))(kwargs[name])


def activation(e: Entry, x: Tensor, h: Tensor) -> Tensor:
    """The module's output after one activation method."""
    p = e.tensors(h.dtype)
    carries = isinstance(e.method, ActivationMethod) and e.method.carries
    if carries:
        notes = e.carried()
        if e.position and not notes and not cast(Any, e.state).again and torch._C._current_graph_task_id() != -1:  # a backward pass
            raise InputError(
                f"{e.site_name}: {e.method.key} passes something on from site to site, which a block that runs again in backward does not find; "
                "use exapt.recomputed(model) (train.checkpointing) in place of the model's own checkpointing"
            )
        p["carried"] = tuple(notes.values())  # type: ignore[assignment]
    if e.axis == -1:
        y = e.method.apply(p, x, h)
    else:
        y = e.method.apply(p, x.movedim(e.axis, -1) if x.dim() >= -e.axis else x, h.movedim(e.axis, -1))
    if carries:
        y, note = y
        notes[e.position] = note
    return cast(Tensor, y if e.axis == -1 else y.movedim(-1, e.axis))


def _entered(e: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The module's arguments with what the method makes of its input."""
    x = first_tensor(args, kwargs)
    p = e.tensors(x.dtype if x.is_floating_point() else None)
    moved = e.axis != -1 and x.dim() >= -e.axis
    new = e.method.enter(p, x.movedim(e.axis, -1)).movedim(-1, e.axis) if moved else e.method.enter(p, x)
    if new.dim() > 2 and new.shape[:-1] != x.shape[:-1]:
        for value in (*args, *kwargs.values()):
            if value is not x and isinstance(value, (Tensor, tuple)) and x.shape[1] in _lengths(value):
                raise InputError(f"{e.method.key} makes the sequence longer, but {e.site_name} was called with a mask or positions for it; use prefixes here")

    def swap(v: Any) -> Any:
        return new if v is x else (new, *v[1:]) if isinstance(v, tuple) and v and v[0] is x else v

    return tuple(swap(v) for v in args), {k: swap(v) for k, v in kwargs.items()}


def _lengths(value: Any) -> set[int]:
    tensors = [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]
    return {n for t in tensors for n in t.shape[1:]}


def _note_call(slots: Slots, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Notes the inputs that methods read; what the model's own forward does not take is kept from it.

    ``input_ids`` are those of the whole sequence: of the tokens in a key-value cache they are kept from the calls before.
    """
    state = slots.state
    assert slots.takes is not None
    names, takes_all = slots.takes
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    before, cached = state.call.get("input_ids"), cached_length(given.get("past_key_values"))
    state.call.clear()
    state.call.update({n: given[n] for n in state.reads if isinstance(given.get(n), Tensor)})
    if "input_ids" in state.reads and "input_ids" not in state.call and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
        state.call["input_ids"] = args[0]
    ids = state.call.get("input_ids")
    if cached and ids is not None:
        if before is None or before.shape != (len(ids), cached):
            raise InputError(f"the cache holds {cached} tokens that the adapters did not read; generate from the start with them, or with use_cache=False")
        state.call["input_ids"] = torch.cat([before, ids], 1)
    return args, {k: v for k, v in kwargs.items() if k in names or k not in state.known or (takes_all and k not in OURS)}


OURS = ("task_ids", "scalings", "prior", "domain", "queries")
"""Inputs that only methods know: no model is given them."""


@functools.cache
def _parameters_of(base: type[nn.Module]) -> tuple[tuple[str, ...], bool]:
    """Names that a class's forward takes, and whether it takes any."""
    parameters = inspect.signature(base.forward).parameters
    return tuple(parameters)[1:], any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _run_sides(slots: Slots, module: nn.Module, chain: Chain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tapped block: run it without gradient, note its output; the last one hands over to the side network."""
    with torch.no_grad():
        y = slots.frozen_forward(module, *args, **kwargs)
    for e in chain.sides:
        taps = slots.state.taps
        if e.position == 0:
            mask, causal = block_mask(module, args, kwargs)
            taps[e.adapter] = Taps([first_tensor(args, kwargs).detach()], mask, causal)
        seen = taps[e.adapter]
        y = replace_first(y, lambda h: h.detach())
        seen.hidden.append(first_tensor((y,), {}))
        if e.last:
            final = e.method.forward(e.tensors(seen.hidden[-1].dtype), taps.pop(e.adapter))
            y = replace_first(y, lambda h, final=final: final)  # type: ignore[misc]
    return y


def first_tensor(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among positional, then keyword arguments (or inside a tuple or a ModelOutput)."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
            return value[0]
        if isinstance(value, dict):
            found = [v for v in value.values() if isinstance(v, Tensor) and v.is_floating_point()]
            if found:
                return cast(Tensor, getattr(value, "logits", None) if getattr(value, "logits", None) is not None else found[0])
    raise TypeError("an adapted module was called without a tensor")


def replace_first(y: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies ``change`` to an output: a tensor, the first of a tuple, or ``logits`` (else the first) of a ModelOutput."""
    if isinstance(y, Tensor):
        return change(y)
    if isinstance(y, (tuple, list)):
        return type(y)((change(y[0]), *y[1:]))
    if isinstance(y, dict):
        key = "logits" if "logits" in y else next(k for k, v in y.items() if isinstance(v, Tensor) and v.dim() > 0)
        return type(y)(**{**y, key: change(y[key])})
    raise TypeError(f"an adapted module returned {type(y).__name__}; a tensor, tuple or ModelOutput is needed")


def _rebuild(base: type[nn.Module], overrides: tuple[str, ...], attention: bool) -> nn.Module:
    return object.__new__(swapped(base, overrides, attention))  # type: ignore[arg-type]


@functools.cache
def swapped(base: type[nn.Module], overrides: tuple[str, ...], attention: bool) -> type[nn.Module]:
    """The cached subclass of ``base`` whose forward runs the adapters, with a property over each overridden parameter."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slots = cast(Slots, self._modules["exapt"])
        if slots.state.rows is not None:
            return run_rows(slots, self, args, kwargs)
        return slots.run(self, slots.chain, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (base, overrides, attention), self.__dict__

    body: dict[str, Any] = {k: getattr(base, k) for k in ("__module__", "__qualname__", "__doc__")} | {"forward": forward, "__reduce_ex__": reduce}
    if issubclass(base, nn.Sequential):
        body.update(_sequence(base))
    for name in overrides:
        body[name] = _parameter_property(name)
    if attention and not issubclass(base, nn.MultiheadAttention):
        body["config"] = config_property()
    return type(base.__name__, (base,), body)


def _sequence(base: type[nn.Module]) -> dict[str, Any]:
    """nn.Sequential runs and counts all its children; these leave ours out."""

    def items(self: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(k, m) for k, m in self._modules.items() if k != "exapt" and m is not None]

    def get(self: nn.Module, index: Any) -> Any:
        return base(OrderedDict(items(self)[index])) if isinstance(index, slice) else items(self)[index][1]

    return {"__iter__": lambda self: iter([m for _, m in items(self)]), "__len__": lambda self: len(items(self)), "__getitem__": get}


def _parameter_property(name: str) -> property:
    def get(self: nn.Module) -> Tensor:
        stored = cast(Tensor, self._parameters[name])
        if hasattr(stored, "full_tensor"):
            return stored  # sharded just now: FSDP2 is looking for its own parameter, no forward can use it
        return cast(Slots, self._modules["exapt"]).value(self, name)

    def put(self: nn.Module, value: Tensor) -> None:
        self._parameters[name] = cast(nn.Parameter, value)

    return property(get, put)


def slots_of(model: nn.Module) -> Iterator[tuple[nn.Module, Slots]]:
    """Every adapted module of ``model`` with its slots."""
    for _, module in walk(model):
        slots = module._modules.get("exapt")
        if isinstance(slots, Slots):
            yield module, slots


def _wear(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives a module its class, unless it has it already, perhaps under that of FSDP2."""
    if not hasattr(module, "set_reshard_after_forward"):
        module.__class__ = cls
    elif cls not in type(module).__bases__:
        raise InputError(f"a sharded {cls.__name__} cannot change how its adapters act; attach, activate and merge before fully_shard")


def refresh(module: nn.Module, slots: Slots) -> None:
    """Brings a module in line with the active adapters after adapters came or went; restores its own class where nothing is left."""
    slots.state.ready.forget()
    if not slots.entries and not slots.aliases and not slots.is_root and not slots.watchers:
        if slots.hook is not None:
            slots.hook.remove()
        del module._modules["exapt"]
        _wear(module, slots.base_class)
        return
    fit(module, slots)


def fit(module: nn.Module, slots: Slots) -> None:
    """Gives a module the chain of the active adapters, and the class that goes with it."""
    chain = slots.chain_of(slots.state.active)
    if slots.is_root and slots.takes is None:
        slots.takes = _parameters_of(cast(Any, slots.base_class))  # here and not in forward: a compiler cannot see through the cache
    if chain.prefixes and slots.config is None and "config" in module.__dict__:
        slots.config = prefixed_config(module)
    _wear(module, swapped(slots.base_class, chain.overrides, bool(chain.prefixes)))  # type: ignore[arg-type]
    slots.__dict__["chain"] = chain
