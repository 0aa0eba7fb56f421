"""What hangs under an adapted module, and how its forward runs: once, for every method and every kind of layer.

An adapted module keeps its identity: ``__class__`` becomes a cached subclass of its own class, and one child module,
``exapt``, holds the adapters' tensors. A method without a fast path, or on a parameter that its module reads itself, acts
through a property over that parameter; the others act in ``forward``.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from exapt.core.base import Base, plain
from exapt.core.contract import Columns, Method, SubsetMethod, Taps, TokenMethod, WeightMethod
from exapt.core.layers import Layer, walk

if TYPE_CHECKING:
    from exapt.core.attach import State

HALF = (torch.float16, torch.bfloat16)


class Holder(nn.Module):
    """The tensors of one adapter at one place: parameters train, buffers do not."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
        super().__init__()
        for name, t in tensors.items():
            fixed = isinstance(t, nn.Buffer)
            value = t.detach().to(device=device, dtype=dtype if dtype and t.is_floating_point() else t.dtype).contiguous()
            if fixed:
                self.register_buffer(name, value, persistent=cast(Any, t).persistent)
            else:
                self.register_parameter(name, nn.Parameter(value.clone() if value is t else value))

    def tensors(self) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], {**self._parameters, **self._buffers})

    def ask(self, grad: bool) -> None:
        """Lets the parameters ask for gradients, or not."""
        for p in self._parameters.values():
            if p is not None and p.requires_grad is not grad:
                p.requires_grad_(grad)


@dataclass(eq=False)
class Entry:
    """One adapter at one site. ``definition``: acts through the parameter, not in ``forward``."""

    adapter: str
    method: Any
    site_name: str
    layer: Layer | None
    holder: Holder
    common: Holder | None
    axis: int = -1
    definition: bool = False
    chosen: dict[str, str] = field(default_factory=dict)
    position: int = 0
    last: bool = False
    source: Slots | None = None

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The method's ``p``; cast once to the layer's dtype unless the method asks for full precision."""
        p = self.holder.tensors()
        if self.common is not None:
            p = {**self.common.tensors(), **p}
        if dtype is None or self.method.full_precision:
            return p
        return {k: v.to(dtype) if v.is_floating_point() and v.dtype != dtype else v for k, v in p.items()}

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.method.forward(self.tensors(_compute_dtype(x, base.module)), x, base)

    def changed(self, parameter: str, value: Tensor) -> Tensor:
        """The definition: the stored parameter's new value from its old one (already dequantised)."""
        p = self.tensors(value.dtype)
        if isinstance(self.method, SubsetMethod):
            return _replace(self.chosen.get(parameter), p, parameter, value, self.layer)
        layer = self.layer
        assert layer is not None
        assert isinstance(self.method, WeightMethod)
        run: Callable[..., Tensor]
        if parameter == layer.parameter:
            matrix, run = layer.to_matrix(value), self.method.weight
            if layer.stacked:
                matrix = torch.vmap(run, in_dims=(self._stacked_dims(p), 0))(p, matrix)
            else:
                matrix = run(p, matrix)
            return layer.from_matrix(matrix).to(value.dtype)
        run = self.method.bias
        changed = torch.vmap(run, in_dims=(self._stacked_dims(p), 0))(p, value) if layer.stacked else run(p, value)
        return changed.to(value.dtype)

    def _stacked_dims(self, p: dict[str, Tensor]) -> dict[str, int | None]:
        own = self.holder.tensors()
        return {k: 0 if k in own else None for k in p}

    def names(self) -> tuple[str, ...]:
        """The module's parameters that this entry changes."""
        if isinstance(self.method, SubsetMethod):
            return tuple(self.chosen)
        if not isinstance(self.method, WeightMethod) or self.layer is None:
            return ()
        bias = type(self.method).bias is not WeightMethod.bias and self.layer.bias
        return (self.layer.parameter, self.layer.bias) if bias and self.layer.bias else (self.layer.parameter,)


def _compute_dtype(x: Any, module: nn.Module) -> torch.dtype | None:
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return next((p.dtype for p in module._parameters.values() if p is not None and p.is_floating_point()), None)


def _replace(how: str | None, p: dict[str, Tensor], name: str, value: Tensor, layer: Layer | None) -> Tensor:
    if how is None:
        return value
    new = p[name].to(value.dtype)
    if how == "whole":
        return new
    index = p[f"{name}_index"]
    if how == "entries":
        return value.flatten().index_put((index,), new).view(value.shape)
    assert layer is not None
    matrix = layer.to_matrix(value).index_copy(1, index, new)
    return layer.from_matrix(matrix)


@dataclass(frozen=True)
class Chain:
    """The active entries of one module, sorted by how they act."""

    inner: tuple[Entry, ...] = ()
    fast: tuple[Entry, ...] = ()
    after: tuple[Entry, ...] = ()
    tokens: tuple[Entry, ...] = ()
    sides: tuple[Entry, ...] = ()
    prefixes: tuple[Entry, ...] = ()
    overrides: tuple[str, ...] = ()


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

    def __init__(self, state: State, base_class: type[nn.Module], layer: Layer | None, is_root: bool = False) -> None:
        super().__init__()
        self.__dict__.update(  # not one by one: nn.Module's __setattr__ looks through every register each time
            state=state, is_root=is_root, base_class=base_class, _main_layer=layer, entries=[], aliases=[], chain=Chain(), chains={},
            watchers=0, seen=None, hook=None, config=None,
        )  # fmt: skip

    @property
    def layer(self) -> Layer:
        assert self._main_layer is not None
        return self._main_layer

    def frozen_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The base class's forward; where a definition acts on a quantised weight, the layer's plain operation."""
        if self.chain.inner and self._main_layer is not None and self._main_layer.kind == "linear":
            stored = module._parameters["weight"]
            if stored is not None and plain(stored) is not stored:
                bias = self.value(module, "bias") if module._parameters.get("bias") is not None else None
                return nn.functional.linear(args[0], self.value(module, "weight").to(args[0].dtype), bias)
        return self.base_class.forward(module, *args, **kwargs)

    def value(self, module: nn.Module, name: str, entries: Sequence[Entry] | None = None) -> Tensor:
        """The effective value of a stored parameter under the inner (or given) entries."""
        stored = module._parameters[name]
        for own, (owner, owners_name) in self.aliases:
            if own == name:
                slots = cast(Slots, owner._modules["exapt"])
                stored = cast(nn.Parameter, slots.value(owner, owners_name, slots.chain.inner + slots.chain.fast))
        value = cast(Tensor, stored)
        for e in self.chain.inner if entries is None else entries:
            if name in e.names():
                value = e.changed(name, plain(value))
        return value

    def matrix(self, module: nn.Module, entries: tuple[Entry, ...]) -> Tensor:
        return self.layer.to_matrix(plain(self.value(module, self.layer.parameter, self.chain.inner + entries)))

    def bias(self, module: nn.Module, entries: tuple[Entry, ...]) -> Tensor | None:
        name = self.layer.bias
        if name is None or module._parameters.get(name) is None:
            return None
        return self.value(module, name, self.chain.inner + entries)

    def chain_of(self, names: tuple[str, ...]) -> Chain:
        """The chain of the adapters ``names``, in that order."""
        if names not in self.chains:
            self.chains[names] = _sorted_chain([e for n in names for e in self.entries if e.adapter == n], self.aliases)
        return self.chains[names]

    def run(self, module: nn.Module, chain: Chain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward with the entries of ``chain`` in effect."""
        from exapt.core.attention import prefixed_multihead, run_prompted

        if self.watchers:
            self.seen = first_tensor(args, kwargs)
        if chain.sides:
            return _run_sides(self, module, chain, args, kwargs)
        if chain.tokens and self.is_root:
            return run_prompted(self, module, chain, args, kwargs)
        if chain.prefixes and isinstance(module, nn.MultiheadAttention):
            return prefixed_multihead(module, chain.prefixes, args, kwargs)
        if chain.fast:
            y = Base(module, self, chain.fast, (args[1:], kwargs))(args[0]) if args else _by_keyword(self, module, chain, kwargs)
            if getattr(module, "padding_idx", None) is not None:
                y = torch.where((first_tensor(args, kwargs) == module.padding_idx)[..., None], y.detach(), y)  # padding takes no gradient
        else:
            y = self.frozen_forward(module, *args, **kwargs)
        for e in chain.tokens:
            y = replace_first(y, lambda h, e=e: e.method.extend(e.tensors(h.dtype), h))  # type: ignore[misc]
        for e in chain.after:
            x = first_tensor(args, kwargs) if e.source is None else cast(Tensor, e.source.seen)
            y = replace_first(y, lambda h, e=e, x=x: _activation(e, x, h))  # type: ignore[misc]
        return y


def _sorted_chain(entries: list[Entry], aliases: list[Any]) -> Chain:
    weights = [e for e in entries if e.names()]
    cut = max((i + 1 for i, e in enumerate(weights) if e.definition), default=0)
    inner, fast = tuple(weights[:cut]), tuple(weights[cut:])
    tokens = tuple(e for e in entries if isinstance(e.method, TokenMethod))
    return Chain(
        inner, fast,
        tuple(e for e in entries if e.method.contract in ("activation", "output")),
        tuple(e for e in tokens if e.method.level == "input"),
        tuple(e for e in entries if e.method.contract == "side"),
        tuple(e for e in tokens if e.method.level == "attention"),
        tuple(sorted({n for e in inner for n in e.names()} | {own for own, _ in aliases})),
    )  # fmt: skip


def _by_keyword(slots: Slots, module: nn.Module, chain: Chain, kwargs: dict[str, Any]) -> Tensor:
    name = next(iter(kwargs))
    rest = {k: v for k, v in kwargs.items() if k != name}
    return Base(module, slots, chain.fast, ((), rest))(kwargs[name])


def _activation(e: Entry, x: Tensor, h: Tensor) -> Tensor:
    p = e.tensors(h.dtype)
    if e.axis == -1:
        return e.method.apply(p, x, h)
    moved = e.method.apply(p, x.movedim(e.axis, -1) if x.dim() >= -e.axis else x, h.movedim(e.axis, -1))
    return moved.movedim(-1, e.axis)


def _run_sides(slots: Slots, module: nn.Module, chain: Chain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tapped block: run it without gradient, note its output; the last one hands over to the side network."""
    from exapt.core.attention import block_mask

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

    from exapt.core.routing import run_rows

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
        from exapt.core.attention import config_property

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


def refresh(module: nn.Module, slots: Slots) -> None:
    """Brings a module's chain and class in line with the active adapters; restores its own class where nothing is left."""
    if not slots.entries and not slots.aliases and not slots.is_root and not slots.watchers:
        if slots.hook is not None:
            slots.hook.remove()
        del module._modules["exapt"]
        module.__class__ = slots.base_class
        return
    slots.chain = slots.chain_of(slots.state.active)
    if slots.chain.prefixes and slots.config is None and "config" in module.__dict__:
        from exapt.core.attention import prefixed_config

        slots.config = prefixed_config(module)
    module.__class__ = swapped(slots.base_class, slots.chain.overrides, bool(slots.chain.prefixes))  # type: ignore[arg-type]


def selection(method: SubsetMethod, site: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a subset method at a site (chosen entries' present values, their indices), and how each was chosen."""
    from exapt.core.contract import Entries, Whole, frozen
    from exapt.core.layers import dense

    tensors: dict[str, Tensor] = {}
    chosen: dict[str, str] = {}
    for name, part in method.select(site).items():
        value = dense(cast(Tensor, site.module._parameters[name])).detach()
        if isinstance(part, Columns):
            tensors[name], chosen[name] = site.layer.to_matrix(value)[:, part.index], "columns"
        elif isinstance(part, Entries):
            tensors[name], chosen[name] = value.flatten()[part.index], "entries"
        else:
            tensors[name], chosen[name] = value.clone(), "whole"
        if not isinstance(part, Whole):
            tensors[f"{name}_index"] = frozen(part.index)
    return tensors, chosen


def chosen_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """How a subset method's tensors were chosen, told from them alone."""

    def how(name: str, value: Tensor) -> str:
        return "whole" if f"{name}_index" not in tensors else "columns" if value.dim() == 2 else "entries"

    return {k: how(k, t) for k, t in tensors.items() if not k.endswith("_index")}


def usable(method: Method, site: Any) -> bool:
    """Whether the contract of ``method`` has anything to act on at ``site``."""
    if method.contract == "weight":
        return site.layer is not None
    if method.contract == "subset":
        if site.name != site.module_name or not any(p is not None for p in site.module._parameters.values()):
            return False
        return bool(method.needs) or bool(cast(SubsetMethod, method).select(site))
    if method.contract == "token":
        level = cast(TokenMethod, method).level
        return site.role == "attention" if level == "attention" else site.role in ("model", "embeddings")
    return site.name == site.module_name or site.source is not None
