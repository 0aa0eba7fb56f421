"""Blocks over attached adapters beside activate (stack), parallel and routed (batch split): averages of outputs, and splits of the sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from exapt.core.components import component
from exapt.core.errors import InputError, did_you_mean
from exapt.core.routing import parallel
from exapt.core.slots import Slots, first_tensor, replace_first, slots_of
from exapt.core.state import set_active, set_gradients, state_of


@component("average_outputs", kind="composition", oracle="the adapters one by one")
@contextlib.contextmanager
def average_outputs(model: nn.Module, *names: str | None, weights: Sequence[float] | None = None) -> Iterator[nn.Module]:
    r"""Within the block the model gives the weighted mean of what it gives with each of the adapters: :math:`y = \sum_n w_n y_n / \sum_n w_n`.

    Args:
        model: The model with adapters attached.
        names: The adapters (``None``: the base model).
        weights: One for each, by default equal.

    Raises:
        InputError: for an unknown name, or weights that do not fit or sum to zero.

    >>> import exapt
    >>> model = exapt.attach(nn.Sequential(nn.Linear(2, 3)), exapt.LoRA(rank=1), where="all", name="a")
    >>> with average_outputs(model, "a", None):
    ...     model(torch.ones(4, 2)).shape
    torch.Size([4, 3])
    """
    shares = torch.tensor(weights if weights is not None else [1.0] * len(names), dtype=torch.float64)
    if len(shares) != len(names) or not names or float(shares.sum()) == 0:
        raise InputError(
            f"average_outputs: {len(names)} adapters and {len(shares)} weights that sum to {float(shares.sum()):g}; give one for each, not all zero"
        )
    shares = shares / shares.sum()

    def mean(module: nn.Module, args: Any, y: Any) -> Any:
        size = first_tensor((y,), {}).shape[0]

        def of(v: Any) -> Any:
            if not isinstance(v, Tensor) or v.dim() == 0 or v.shape[0] != size or not v.is_floating_point():
                return v
            return torch.einsum("n,n...->...", shares.to(v.device, v.dtype), v.unflatten(0, (len(names), -1)))

        return tree_map(of, y)

    with parallel(model, *names):
        hook = model.register_forward_hook(mean)
        try:
            yield model
        finally:
            hook.remove()


@component("split_sequence", kind="composition", oracle="NumPy")
@contextlib.contextmanager
def split_sequence(model: nn.Module, parts: Mapping[str, int]) -> Iterator[nn.Module]:
    """Within the block each position of a sequence goes through the adapter of its part, at every adapted layer.

    Args:
        model: The model with adapters attached, which act in their modules' forward.
        parts: Adapters and how many positions each has, in order; what is longer than all together runs on the base model.

    Raises:
        InputError: for an unknown name, a negative length, or an adapter that acts otherwise (prompts, prefixes, side networks, parameters).

    >>> import exapt
    >>> model = exapt.attach(nn.Sequential(nn.Linear(2, 3)), exapt.LoRA(rank=1), where="all", name="a")
    >>> with split_sequence(model, {"a": 2}):
    ...     model(torch.ones(1, 5, 2)).shape
    torch.Size([1, 5, 3])
    """
    state = state_of(model)
    for name, length in parts.items():
        if name not in state.adapters:
            raise InputError(f'no adapter "{name}" on this model{did_you_mean(name, state.adapters)} (attached: {", ".join(state.adapters)})')
        if length < 0:
            raise InputError(f'split_sequence: adapter "{name}" is given {length} positions; lengths are not negative')
    entries = [(m, slots, e) for m, slots in slots_of(model) for e in slots.entries if e.adapter in parts]
    for _, slots, e in entries:
        if e.definition or e.source is not None or e.sees_more or slots.is_root or e.method.contract not in ("weight", "activation", "subset"):
            raise InputError(f"split_sequence: {e.method.key} at {e.site_name or '(model)'} does not act position by position; take another adapter")
    before = state.active
    set_active(model, ())
    set_gradients(model, list(parts))
    hooks = [m.register_forward_hook(_pieces(slots, parts), with_kwargs=True) for m, slots in {id(m): (m, s) for m, s, _ in entries}.values()]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        set_active(model, before)
        set_gradients(model, before)


def _pieces(slots: Slots, parts: Mapping[str, int]) -> Any:
    """A hook that puts a module's output together from what it gives with each adapter."""
    own = {e.adapter for e in slots.entries}

    def hook(module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        start, h = 0, first_tensor((y,), {})
        if h.dim() < 3:
            raise InputError(f"split_sequence: a layer gave {tuple(h.shape)}, which has no positions; choose sites inside the sequence")
        pieces = []
        for name, length in parts.items():
            new = first_tensor((slots.run(module, slots.chain_of((name,)), args, kwargs),), {}) if name in own else h
            pieces.append(new[:, start : start + length])
            start += length
        joined = torch.cat([*pieces, h[:, start:]], 1)
        return replace_first(y, lambda _: joined)

    return hook
