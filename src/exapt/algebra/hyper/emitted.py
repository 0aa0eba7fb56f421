"""Running a model with an adapter that another network emitted, and keeping it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.errors import InputError


def call_with(model: nn.Module, emitted: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The model's call with emitted tensors in place of its adapter's, gradients reaching the network that emitted them.

    Args:
        model: The adapted model.
        emitted: Tensors by their names in ``exapt.trainable(model)``.
        args, kwargs: Of the call.

    Raises:
        InputError: for a tensor that the model does not have, or in another shape.

    >>> import exapt
    >>> model = exapt.attach(nn.Linear(2, 1, bias=False), exapt.SSF(), where="all")
    >>> new = {n: torch.zeros_like(t) for n, t in exapt.trainable(model).items()}
    >>> call_with(model, new, torch.ones(1, 2)).tolist()
    [[0.0]]
    """
    _check(model, emitted)
    return torch.func.functional_call(model, dict(emitted), args, kwargs)


def install(model: nn.Module, emitted: Mapping[str, Tensor]) -> None:
    """Writes emitted tensors into the model's adapter: to save it, to predict with it, to start fine-tuning from it.

    Raises:
        InputError: as :func:`call_with`.
    """
    own = _check(model, emitted)
    with torch.no_grad():
        for name, t in emitted.items():
            own[name].copy_(t)


@contextlib.contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block a mapping that holds the input of each named module in the last call.

    >>> model = nn.Sequential(nn.Linear(2, 1))
    >>> with watched(model, ["0"]) as seen:
    ...     _ = model(torch.ones(1, 2))
    >>> seen["0"].tolist()
    [[1.0, 1.0]]
    """
    from exapt.core.slots import first_tensor

    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, args, kwargs: seen.__setitem__(name, first_tensor(args, kwargs))

    hooks = [model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in dict.fromkeys(names)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _check(model: nn.Module, emitted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own: dict[str, Tensor] = dict(model.named_parameters())
    for name, t in emitted.items():
        if name not in own or own[name].shape != t.shape:
            here = f"of shape {tuple(own[name].shape)}" if name in own else "missing"
            raise InputError(f"{name} was emitted in shape {tuple(t.shape)}; in the model it is {here}")
    return own
