"""What objectives and test-time methods see of a model: its logits, its head's input, outputs inside it, and what changing those does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.errors import InputError
from exapt.core.sites import Where, choose, sites
from exapt.core.slots import first_tensor, replace_first

Change = Callable[[Tensor], Tensor]


@dataclass
class View:
    """One forward pass.

    Attributes:
        output: What the model returned.
        logits: The logits in it.
        features: The input of the head (batch, ..., d); ``None`` for a model without a head that can be told.
        taps: Outputs of the watched sites, by name.
    """

    output: Any
    logits: Tensor
    features: Tensor | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)


class Viewer:
    """Runs a model and notes what it did. The model is not changed: hooks live for one call.

    Args:
        model: Any module.
        head: Name of the module that makes the logits; by default the one whose role is "head".
        taps: Sites whose outputs are noted, as for ``attach``.

    Raises:
        InputError: for a head or taps that the model does not have.
    """

    def __init__(self, model: nn.Module, head: str | None = None, taps: Where | None = None) -> None:
        self.model = model
        self._known: dict[Any, list[tuple[str, nn.Module]]] = {}
        self.head_name = head if head is not None else next((s.module_name for s in sites(model) if s.role == "head"), None)
        if self.head_name is not None and self.head_name not in dict(model.named_modules()):
            raise InputError(f'the model has no module "{self.head_name}" to take for its head; see exapt sites')
        self.taps = [] if taps is None else self.places(taps)

    def places(self, where: Where) -> list[tuple[str, nn.Module]]:
        """Names and modules of the sites that ``where`` chooses."""
        key = tuple(where) if isinstance(where, list) else where
        if key not in self._known:
            self._known[key] = [(s.name, s.module) for s in choose(sites(self.model), where, lambda s: s.source is None)]
        return self._known[key]

    @property
    def head(self) -> nn.Module:
        """The module that makes the logits.

        Raises:
            InputError: if the model's structure does not tell.
        """
        if self.head_name is None:
            raise InputError(f"{type(self.model).__name__} has no layer that can be told to be its head; name it with head=")
        return self.model.get_submodule(self.head_name)

    def __call__(self, call: Callable[[], Any], change: Mapping[Any, Change] | None = None) -> View:
        """Runs ``call`` (which calls the model) and returns what was seen.

        Args:
            call: Calls the model and returns its output.
            change: ``{where: function}``: outputs of these sites (tensors) are replaced by what the function makes of them.
        """
        seen: dict[str, Tensor] = {}
        taps: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            if self.head_name is not None:
                hook = self.head.register_forward_pre_hook(lambda _m, a, k: seen.__setitem__("features", first_tensor(a, k)), with_kwargs=True)
                stack.callback(hook.remove)
            for where, function in (change or {}).items():
                for _, module in self.places(where):
                    hook = module.register_forward_hook(lambda _m, _a, out, f=function: replace_first(out, f))  # type: ignore[misc]
                    stack.callback(hook.remove)
            for name, module in self.taps:
                hook = module.register_forward_hook(lambda _m, _a, out, n=name: taps.__setitem__(n, first_tensor((out,), {})))  # type: ignore[misc]
                stack.callback(hook.remove)
            output = call()
        return View(output, first_tensor((output,), {}), seen.get("features"), taps)


def flat(logits: Tensor, features: Tensor | None, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """One row for every prediction: (n, classes) and (n, d), from logits of sentences (n, length, classes) too.

    Args:
        logits: (batch, ..., classes).
        features: (batch, ..., d), or other shapes, which are pooled to (batch, d) where the logits are (batch, classes).
        kept: Booleans of shape (batch, ...): the predictions that count.
    """
    if logits.dim() == 2:
        rows = None if features is None else features if features.dim() == 2 else features.flatten(1)
        return (logits, rows) if kept is None else (logits[kept], None if rows is None else rows[kept])
    kept = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if kept is None else kept
    inside = None if features is None or features.shape[:-1] != logits.shape[:-1] else features[kept]
    return logits[kept], inside


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is in evaluation mode; every module's own mode is put back."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for m, training in before:
            m.training = training
