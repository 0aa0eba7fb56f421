"""Heads: what turns a headless encoder into a model for a task, and how the names outside a backbone are told."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from exapt.core.errors import InputError


class Classifier(nn.Module):
    r"""A headless encoder with a linear head on its pooled hidden states; parameters ``backbone.*`` and ``head.*``.

    Args:
        backbone: Called with the inputs by keyword (or one tensor); gives ``last_hidden_state`` (batch, length, d), or that tensor.
        n_classes: Outputs of the head.
        pooling: ``"mean"`` over the positions that the attention mask keeps, ``"cls"`` the first position, ``"none"``
            every position by itself (token classification).

    Returns:
        Logits (batch, n_classes), or (batch, length, n_classes) without pooling.
    """

    def __init__(self, backbone: nn.Module, n_classes: int, pooling: Literal["mean", "cls", "none"] = "mean") -> None:
        super().__init__()
        width = getattr(getattr(backbone, "config", None), "hidden_size", None)
        if width is None:
            raise InputError(f"{type(backbone).__name__} has no config.hidden_size, so no head can be sized for it; give a model that returns logits")
        self.backbone = backbone
        first = next(backbone.parameters())
        self.head = nn.Linear(int(width), n_classes, device=first.device, dtype=first.dtype if first.is_floating_point() else None)
        self.pooling = pooling

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    def forward(self, inputs: Tensor | None = None, **named: Any) -> Tensor:
        named = {k: v for k, v in named.items() if k != "token_type_ids" or accepts(self.backbone, k)}
        out = self.backbone(**named) if inputs is None else self.backbone(inputs, **named)
        hidden = out if isinstance(out, Tensor) else out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
        return self.head(self._pooled(hidden, named.get("attention_mask")).to(self.head.weight.dtype))

    def _pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if self.pooling == "none":
            return hidden
        if self.pooling == "cls":
            return hidden[:, 0]
        if mask is None:
            return hidden.mean(1)
        kept = mask[..., None].to(hidden.dtype)
        return (hidden * kept).sum(1) / kept.sum(1).clamp_min(1)


@functools.cache
def _parameters(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's ``forward`` names an argument so."""
    return name in _parameters(type(model).forward)


def headless(model: nn.Module) -> bool:
    """Whether a model is a bare encoder of the transformers library, which returns hidden states."""
    return hasattr(model, "config") and getattr(model, "base_model", None) is model


def head_places(model: nn.Module) -> list[str]:
    """Names of the layers with parameters that stand outside the backbone of a model with a task's head.

    Empty for models of which nothing tells that their head is new.
    """
    if isinstance(model, Classifier):
        return ["head"]
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        return []
    outside = (n for n, m in model.named_modules() if n and any(p is not None for p in m._parameters.values()))
    return [n for n in outside if not n.startswith(f"{prefix}.") and n != prefix and ".exapt" not in f".{n}"]


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: the tensor itself, ``.logits``, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        logits = output[0]
    if logits is None:
        raise InputError(f"the model returned {type(output).__name__}, in which there are no logits; give a model with a head, or call task.prepare(model)")
    return cast(Tensor, logits)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside the wrappers that training puts around it."""
    while type(model).__name__ in ("_FabricModule", "DistributedDataParallel"):
        model = cast(nn.Module, model.module)
    return model


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on ``device``."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, value)
