"""X-LoRA's two passes: a router that makes scalings of the base model's hidden states."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.contract import Method
from exapt.core.errors import InputError
from exapt.core.sites import sites
from exapt.core.slots import first_tensor
from exapt.core.state import disabled, state_of


@component(
    "xlora_router",
    kind="composition",
    paper="X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with Applications in Protein Mechanics and Design",
    oracle="PEFT",
)
class XLoRARouter(nn.Module):
    r"""Makes scalings for each token, layer and expert from hidden states: a multilayer perceptron, :math:`\lambda = W_n\, \mathrm{relu}(\dots W_1 h_t)`.

    Calling it with an adapted model runs the two passes: the first on the base model alone, without gradient, for the last hidden states; the
    second with the scalings that this router makes of them. Only the router trains, where the experts came from
    :func:`~exapt.algebra.compose.experts.from_adapters`; it is a module of its own, so give an optimiser ``router.parameters()`` and keep its ``state_dict``.

    Args:
        model: The model, with an :class:`~exapt.methods.xlora.XLoRA` adapter active; it tells layers, experts and the width of the hidden states.
        depth: Number of linear layers.
        width: Width of those between.
        dropout: Probability of dropping an inner feature in training.
        layerwise: Whether each layer has scalings of its own; otherwise all share a token's.
        softmax: Whether the scalings of a token at a layer go through a softmax (as ``enable_softmax`` of PEFT, whose default it is).
        temperature: Its temperature.

    Raises:
        InputError: if no X-LoRA adapter of several experts is active.

    References:
        Buehler and Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with Applications in Protein
        Mechanics and Design", APL Machine Learning 2024.
    """

    def __init__(
        self, model: nn.Module, depth: int = 1, width: int = 2048, dropout: float = 0.2, layerwise: bool = True, softmax: bool = True, temperature: float = 1.0
    ) -> None:
        super().__init__()
        method, layers = _layers(model)
        if depth < 1 or width < 1 or temperature <= 0:
            raise InputError(f"xlora_router: depth={depth}, width={width}, temperature={temperature}; all are positive")
        self.experts: int = method.experts  # type: ignore[attr-defined]
        self.sites, self.softmax, self.temperature = layers, softmax, temperature
        place = _last(model)
        sizes = [place.features, *[width] * (depth - 1)]
        inner = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))]
        last = nn.Linear(sizes[-1], self.experts * (layers if layerwise else 1))
        self.layers = nn.Sequential(*inner, last).to(place.device, place.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scalings (batch, length, layers, experts) from hidden states (batch, length, d)."""
        scalings = self.layers(hidden).unflatten(-1, (-1, self.experts)).expand(-1, -1, self.sites, -1)
        return (scalings / self.temperature).softmax(-1) if self.softmax else scalings

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Both passes: what ``model(*args, **kwargs)`` gives with this router's scalings."""
        return model(*args, **kwargs, scalings=self(hidden_states(model, *args, **kwargs)))


def hidden_states(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The base model's last hidden states (batch, length, d): what goes into the head, or out of the last block where the head sees a summary.

    Raises:
        InputError: if the model has no blocks of that kind.
    """
    place, seen = _last(model), []
    handle = place.module.register_forward_hook(lambda module, inputs, output: seen.append(first_tensor((output,), {})))
    try:
        with torch.no_grad(), disabled(model):
            model(*args, **kwargs)
    finally:
        handle.remove()
    return seen[-1].detach()


def _last(model: nn.Module) -> Any:
    """The norm after the last block, or the last block."""
    found = sites(model)
    blocks = [i for i, s in enumerate(found) if s.role == "block"]
    if not blocks:
        raise InputError(f"xlora_router needs a model of blocks, whose last hidden states it sees; {type(model).__name__} has none")
    after = [s for s in found[blocks[-1] + 1 :] if s.role == "norm" and not s.name.startswith(f"{found[blocks[-1]].name}.")]
    return after[0] if after else found[blocks[-1]]


def _layers(model: nn.Module) -> tuple[Method, int]:
    """The active X-LoRA method, and the number of its layers."""
    state = state_of(model)
    for name in state.active:
        for method, places in state.adapters[name].rules:
            if method.key == "xlora" and method.experts > 1:  # type: ignore[attr-defined]
                return method, len(places)
    raise InputError("xlora_router: no X-LoRA adapter of several experts is active; attach one: from_adapters(model, paths, XLoRA())")
