"""Activation checkpointing: blocks that run again in backward instead of keeping what they computed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from exapt.core.errors import InputError
from exapt.core.layers import BATCH_NORM
from exapt.core.prompts import cached_length
from exapt.core.roles import roles
from exapt.core.state import State, adapters, state_of

_CACHES = ("past_key_values", "past_key_value", "layer_past")


@contextlib.contextmanager
def recomputed(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within the block, the model's blocks keep only their inputs in training and run again in backward (activation checkpointing).

    The classes stay as they are: the instance gets a ``forward`` that hands over to its class's. Blocks under a side
    network (no backward), and blocks whose batch norms are in training mode (they would count a batch twice), run as ever.
    What adapters read of the call, or pass on from block to block, is what it was when the block ran first; a model's own
    checkpointing does not know of it. An empty key-value cache stays empty.

    Args:
        model: Any module with blocks: repeated members of a list or a sequence.
        wanted: Whether to do so.

    Raises:
        InputError: for a model without blocks.

    >>> import exapt, torch
    >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> model = exapt.attach(nn.Sequential(nn.Sequential(block(), block()), nn.Linear(4, 2)), exapt.LoRA(rank=2))
    >>> with recomputed(model):
    ...     model(torch.ones(1, 4)).sum().backward()

    References:
        T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    state = state_of(model) if adapters(model) else None
    blocks = [model.get_submodule(n) for n, role in roles(model).items() if role == "block"] if wanted else []
    if wanted and not blocks:
        raise InputError("recomputing (train.checkpointing) runs a model's blocks again, and no blocks were found in this one; leave it out")
    for block in blocks:
        block.__dict__["forward"] = functools.partial(_recompute, block, state)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _recompute(block: nn.Module, state: State | None, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(block).forward, block)
    slots: Any = block._modules.get("exapt")
    plain = not block.training or not torch.is_grad_enabled() or (slots is not None and slots.chain.sides)
    caches = {k: kwargs[k] for k in _CACHES if kwargs.get(k) is not None}
    held = any(not hasattr(c, "get_seq_length") or cached_length(c) for c in caches.values())  # tokens of an earlier call, which the block has to see
    if plain or held or any(isinstance(m, BATCH_NORM) and m.training for m in block.modules()):
        return forward(*args, **kwargs)
    kwargs |= dict.fromkeys(caches)  # running again would add to it once more
    again = contextlib.nullcontext() if state is None else _AsItWas(state)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again), **kwargs)


class _AsItWas:
    """Within the block, the adapters find the inputs of an earlier call, and what had been passed on by then."""

    def __init__(self, state: State) -> None:
        self.state, self.call, self.carried = state, dict(state.call), {k: dict(v) for k, v in state.carried.items()}
        self.now: list[tuple[Any, Any, bool]] = []

    def __enter__(self) -> None:
        state = self.state
        self.now.append((state.call, state.carried, state.again))
        state.call, state.carried, state.again = self.call, {k: dict(v) for k, v in self.carried.items()}, True

    def __exit__(self, *error: object) -> None:
        self.state.call, self.state.carried, self.state.again = self.now.pop()
