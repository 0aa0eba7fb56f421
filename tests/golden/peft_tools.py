"""Puts the same numbers into PEFT's layers and into ours, and asks for the same outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import exapt
from exapt.core.contract import Method

peft = pytest.importorskip("peft", reason="PEFT is the independent implementation; install exapt[test]")

QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*jit.*", "ignore:.*model_config.*:UserWarning")
"""PEFT and what it imports use interfaces that torch has deprecated; that is theirs to mend."""


class Same(NamedTuple):
    """A tensor of PEFT's, how its value becomes ours and, where that differs, how its gradient does."""

    theirs: Tensor
    value: Callable[[Tensor], Tensor] = lambda t: t
    gradient: Callable[[Tensor], Tensor] | None = None


class MLP(nn.Module):
    """Layers of different shapes, under names that tell their part."""

    def __init__(self, conv1d: bool = False) -> None:
        super().__init__()
        if conv1d:
            from transformers.pytorch_utils import Conv1D

            self.fc1, self.fc2 = Conv1D(24, 12), Conv1D(16, 24)
        else:
            self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.fc2(F.silu(self.fc1(x)))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 6, (1, 3), bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.fc2(F.silu(self.fc1(x)))).mean((2, 3)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.embed(x)).mean(1))


def randomise(*tensors: Tensor, scale: float = 0.3) -> None:
    with torch.no_grad():
        for t in tensors:
            t.normal_(0, scale)


def our_tensors(model: nn.Module, site: str) -> dict[str, Tensor]:
    return model.get_submodule(site)._modules["exapt"]._modules["default"].tensors()  # type: ignore[union-attr, operator]


def adapted(base: nn.Module, config: Any) -> nn.Module:
    """PEFT's model on a copy of ``base``."""
    return peft.get_peft_model(copy.deepcopy(base), config)


def assert_same(
    base: nn.Module,
    method: Method,
    theirs: nn.Module,
    mapping: Callable[[Any], dict[str, Same]],
    names: list[str],
    x: Tensor,
    before: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """Gives our tensors PEFT's values and compares output, gradient of the input and gradients of the tensors.

    Args:
        base: The model; ``theirs`` is PEFT's on a copy of it.
        method: Our method.
        theirs: PEFT's model.
        mapping: From a layer of PEFT's to our tensors' names and what they are there.
        names: The layers, by their names in ``base``.
        x: Input of the model.
        before: Called with our model after ``attach``, for what ``mapping`` does not cover.
    """
    ours = exapt.attach(copy.deepcopy(base), method, names)
    before(ours)
    pairs = [(our_tensors(ours, n)[k], same) for n in names for k, same in mapping(theirs.base_model.model.get_submodule(n)).items()]
    assert len(pairs) == len(exapt.trainable(ours)), "every tensor that trains has its counterpart"
    with torch.no_grad():
        for mine, same in pairs:
            mine.copy_(same.value(same.theirs))
    gradients = []
    outputs = []
    for model in (ours, theirs):
        inputs = x.clone().requires_grad_(x.is_floating_point())
        y = model(inputs)
        torch.manual_seed(7)
        (y * torch.randn_like(y)).sum().backward()
        outputs.append(y)
        gradients.append(inputs.grad)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(*outputs, **close)
    if x.is_floating_point():
        torch.testing.assert_close(*gradients, **close)
    for mine, same in pairs:
        assert same.theirs.grad is not None
        assert same.theirs.grad.abs().max() > 1e-4, "a gradient of zero would compare nothing"
        torch.testing.assert_close(mine.grad, (same.gradient or same.value)(same.theirs.grad), **close)
    return ours
