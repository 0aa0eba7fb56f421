"""Different adapters for different rows of a batch, equal to running each row alone with its adapter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from exapt.core.errors import InputError, did_you_mean
from exapt.core.rows import Plan, Rows, Stack, is_product, pooled, train, trains_otherwise

if TYPE_CHECKING:
    from exapt.core.slots import Slots
    from exapt.core.state import State

Run = Callable[[Any, Any], Any]
KEPT = 64
"""Mixtures of rows that are kept prepared."""


@contextlib.contextmanager
def routed(model: nn.Module, names: Sequence[str | None], among: Sequence[str] | None = None) -> Iterator[nn.Module]:
    """Within the block, row ``i`` of every batch runs with the adapter ``names[i]`` (``None``: the base model).

    Equal to a loop over rows. A layer runs once for all rows whose adapters add a product of low rank (LoRA and its kin), change its
    output (bottleneck adapters) or leave it alone; the products of all adapters are two batched ones. Other methods
    run the layer again for their own rows, and those that act elsewhere (prompts, prefixes, side networks, methods acting through a
    parameter) the whole model.

    While gradients are off, the stacked factors are kept until a parameter changes, those of adapters that train until the block ends.
    Changes written in place through ``.data`` of an adapter that does not train go unseen until another adapter comes or goes.

    Args:
        model: The model with adapters attached.
        names: One name, or ``None``, per row.
        among: Adapters of low rank that rows may have. Their factors are then stacked once for all of them, and which row has which is
            an index: ``names`` may change from block to block without compiling the model again.

    Raises:
        InputError: for an unknown name, an adapter in ``among`` that does more than add a product of low rank, or when a batch of another
            number of rows arrives.
    """
    from exapt.core.state import set_active, set_gradients, state_of

    state = state_of(model)
    for name in {n for n in (*names, *(among or ())) if n is not None}:
        if name not in state.adapters:
            raise InputError(f'no adapter "{name}" on this model{did_you_mean(name, state.adapters)} (attached: {", ".join(state.adapters)})')
    before = state.rows, state.active
    rows = _rows(model, state, tuple(names)) if among is None else _pool(model, state, tuple(names), tuple(among))
    state.rows = rows
    set_active(model, ())  # no parameter property may act while rows differ
    set_gradients(model, [n for n in dict.fromkeys(among or names) if n is not None])
    try:
        yield model
    finally:
        state.rows, active = before
        set_active(model, active)
        set_gradients(model, active)


def _rows(model: nn.Module, state: State, names: tuple[str | None, ...]) -> Rows:
    """How these rows run, as prepared by an earlier block if there was one."""
    from exapt.core.slots import slots_of

    ready = state.ready
    ready.modules = ready.modules or list(slots_of(model))
    rows = ready.rows.get(names)
    if rows is None:
        for n in dict.fromkeys(names):
            if n not in ready.apart:
                ready.apart[n] = n is not None and any(_runs_apart(slots, n) for _, slots in ready.modules)
        rows = Rows(names, frozenset(n for n in names if ready.apart[n]))
        if len(ready.rows) >= KEPT:
            del ready.rows[next(iter(ready.rows))]
        ready.rows[names] = rows
    for r in (rows, rows.rest):
        if r is not None:
            r.block = object()
    return rows


def _pool(model: nn.Module, state: State, names: tuple[str | None, ...], among: tuple[str, ...]) -> Rows:
    """Rows that find their adapters by an index into stacks of all of ``among``, made here unless they are there."""
    from exapt.core.slots import slots_of

    missing = {n for n in names if n is not None} - set(among)
    if missing:
        raise InputError(f'routed: rows have the adapter "{min(missing)}", which is not in among=')
    ready = state.ready
    ready.modules = ready.modules or list(slots_of(model))
    rows = Rows(names)
    for module, slots in ready.modules:
        entries = tuple(slots.chain_of((n,)).fast if slots.of(n) else () for n in among)
        for n, own in zip(among, entries, strict=True):
            if _runs_apart(slots, n) or len(own) != len(slots.of(n)) or not all(map(is_product, own)) or (own and trains_otherwise(own[0]) and module.training):
                more = ", ".join(e.method.key for e in slots.of(n)) or "tied"
                raise InputError(f'routed: adapter "{n}" ({more}) does more than add a product of low rank; leave out among=')
        entries = (*entries, ())  # of rows without an adapter
        if not any(entries):
            slots.__dict__["pool"] = None
        else:
            dtype = next((p.dtype for p in module.parameters(recurse=False) if p.is_floating_point()), torch.float32)
            if slots.pool is None or not slots.pool.serves(among, rows.block, dtype):
                slots.__dict__["pool"] = Stack(among, entries, rows.block if train(entries) else None, dtype)
    device = next(model.parameters()).device
    rows.index = torch.tensor([len(among) if n is None else among.index(n) for n in names], device=device)
    return rows


def _runs_apart(slots: Slots, name: str) -> bool:
    """Whether an adapter acts here otherwise than in the module's own forward, so that the whole model runs for its rows alone."""
    if any(e.names() for _, (owner, _) in slots.aliases for e in cast("Slots", owner._modules["exapt"]).of(name)):
        return True
    return any(
        e.definition or e.source is not None or e.method.contract in ("token", "side") or e.method.reads or getattr(e.method, "carries", False)
        for e in slots.of(name)
    )


@contextlib.contextmanager
def parallel(model: nn.Module, *names: str | None) -> Iterator[nn.Module]:
    """Within the block every batch runs through all the named adapters (``None``: the base model) in one call.

    The batch is repeated, once for each name: outputs have the rows of the first adapter, then those of the second, and so on, as
    ``y.chunk(len(names))`` takes them apart. Layers without an adapter run once over the longer batch, see :func:`routed`. To
    generate text repeat the prompts and use ``routed(model, names)``, since generation counts its rows itself.

    Args:
        model: The model with adapters attached.
        names: The adapters.

    Raises:
        InputError: for an unknown name, or none.

    >>> import exapt
    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> for name in "abc":
    ...     model = exapt.attach(model, exapt.LoRA(rank=1), where="all", name=name)
    >>> with parallel(model, "a", "b", None):
    ...     model(torch.ones(4, 2)).shape
    torch.Size([12, 3])
    """
    from exapt.core.slots import first_tensor

    if not names:
        raise InputError("parallel needs the names of the adapters to run")

    def repeat(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        size = first_tensor(args, kwargs).shape[0]

        def longer(v: Any) -> Any:
            return torch.cat([v] * len(names)) if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == size else v

        return tree_map(longer, args), tree_map(longer, kwargs)

    with routed(model, names):
        hook = model.register_forward_pre_hook(repeat, with_kwargs=True)
        try:
            yield model
        finally:
            hook.remove()


def run_rows(slots: Slots, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of an adapted module while rows are routed."""
    from exapt.core.slots import first_tensor, replace_first

    rows = slots.state.rows
    assert rows is not None
    if rows.index is not None:
        y, index = slots.run(module, slots.chain, args, kwargs), rows.index
        x = first_tensor(args, kwargs)
        _repeats(x, len(index))
        return replace_first(y, lambda h: _padded(module, x, pooled(slots, index, x, h))) if slots.pool is not None else y
    if rows.apart:
        return _whole(slots, module, args, kwargs, rows) if slots.is_root else slots.run(module, slots.chain, args, kwargs)
    plan = rows.plan(slots, module)
    if plan is None:
        return slots.run(module, slots.chain, args, kwargs)
    if not plan.apart:
        return _together(slots, module, args, kwargs, rows, plan)
    runs: list[tuple[tuple[int, ...], Run]] = []
    if plan.together:
        runs.append((plan.together, lambda a, k: _together(slots, module, a, k, rows, plan)))
    for name, numbers in plan.apart:
        runs.append((numbers, functools.partial(slots.run, module, slots.chain_of((name,)))))
    return _split(args, kwargs, rows, runs)


def _whole(slots: Slots, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows) -> Any:
    """The whole model once for each adapter that needs it so, and once for all other rows."""
    runs: list[tuple[tuple[int, ...], Run]] = []
    if rows.rest is not None:
        together = tuple(i for i, n in enumerate(rows.names) if n not in rows.apart)
        runs.append((together, functools.partial(_run_whole, slots, module, None, rows.rest)))
    runs += [(numbers, functools.partial(_run_whole, slots, module, n, None)) for n, numbers in rows.numbers.items() if n in rows.apart]
    return _split(args, kwargs, rows, runs)


def _run_whole(slots: Slots, module: nn.Module, name: str | None, rest: Rows | None, args: Any, kwargs: Any) -> Any:
    from exapt.core.state import set_active

    state = slots.state
    rows, state.rows = state.rows, rest
    set_active(module, [name] if name else [])
    try:
        return module.forward(*args, **kwargs)
    finally:
        set_active(module, ())
        state.rows = rows


def _split(args: Any, kwargs: Any, rows: Rows, runs: Sequence[tuple[tuple[int, ...], Run]]) -> Any:
    """Runs parts of the batch one after the other, and puts their outputs together again."""
    from exapt.core.slots import first_tensor

    first = first_tensor(args, kwargs)
    size, repeats = first.shape[0], _repeats(first, len(rows.names))
    order: list[Tensor] = []
    parts: list[Any] = []
    for numbers, run in runs:
        index = rows.places_of(numbers, repeats, first.device)

        def pick(v: Any, index: Tensor = index) -> Any:
            return v.index_select(0, index) if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == size else v

        order.append(index)
        parts.append(run(tree_map(pick, args), tree_map(pick, kwargs)))
    return _joined(parts, torch.cat(order).argsort(), [len(o) for o in order])


def _repeats(x: Tensor, n: int) -> int:
    """Samples for each of ``n`` rows."""
    if x.shape[0] % n:
        raise InputError(f"routed() was given {n} names, but a batch of {x.shape[0]} rows arrived; give one name per row")
    return int(x.shape[0] // n)


def _together(slots: Slots, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows, plan: Plan) -> Any:
    """One run of the layer beneath for all these rows, then each row's own adapter."""
    from exapt.core.slots import first_tensor, replace_first

    x = first_tensor(args, kwargs)
    repeats = _repeats(x, len(plan.together))
    y = slots.run(module, slots.chain, args, kwargs)
    products = plan.products
    if products is not None:
        fresh = slots.base_class.forward in (nn.Linear.forward, nn.Embedding.forward) and not torch.is_grad_enabled()
        in_place = fresh and type(y) is Tensor and y.is_contiguous() and not torch._C._are_functorch_transforms_active()
        y = replace_first(y, lambda h: _padded(module, x, products.added(slots, rows.block, x, h, in_place)))
    return replace_first(y, lambda h: _acted(x, h, rows, plan, repeats)) if plan.after else y


def _padded(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A look-up's output, of which padding takes no gradient."""
    padding = getattr(module, "padding_idx", None)
    return torch.where(x.eq(padding)[..., None], y.detach(), y) if padding is not None and y.requires_grad else y


def _acted(x: Tensor, h: Tensor, rows: Rows, plan: Plan, repeats: int) -> Tensor:
    """A module's output with each adapter's activation methods applied to its own rows."""
    from exapt.core.slots import activation

    if h.shape[0] != x.shape[0]:
        raise InputError("routed() needs outputs with one row per input row; a loss over the batch is not one (pass no labels)")
    taken = {i for _, numbers in plan.after for i in numbers}
    left = tuple(i for i in range(len(plan.together)) if i not in taken)
    order = [rows.places_of(left, repeats, h.device)] if left else []
    parts = [h.index_select(0, order[0])] if left else []
    for chain, numbers in plan.after:
        index = rows.places_of(numbers, repeats, h.device)
        own, inputs = h.index_select(0, index), x.index_select(0, index)
        for e in chain.after:
            own = activation(e, inputs, own)
        order.append(index)
        parts.append(own)
    return torch.cat(parts).index_select(0, torch.cat(order).argsort())


def _joined(parts: list[Any], back: Tensor, sizes: list[int]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        if first.dim() == 0 or any(p.shape[0] != n for p, n in zip(parts, sizes, strict=True)):
            raise InputError("routed() needs outputs with one row per input row; a loss over the batch is not one (pass no labels)")
        return torch.cat(parts).index_select(0, back)
    if isinstance(first, dict):
        return type(first)(**{k: _joined([p[k] for p in parts], back, sizes) for k in first})
    if isinstance(first, (tuple, list)):
        return type(first)(_joined([p[i] for p in parts], back, sizes) for i in range(len(first)))
    if all(p is None or p is first for p in parts):
        return first
    raise InputError(f"routed() cannot join outputs of type {type(first).__name__}; for transformers models pass use_cache=False")
