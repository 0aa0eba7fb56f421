"""What a method keeps for the backward pass on one layer, per token, and the least that it could: counted, not estimated."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import exapt
from exapt.core.attach import expanded
from exapt.core.contract import Method

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny import example, perturb

D_IN, D_OUT, FEW, MANY = 64, 48, 64, 128
CONTRACTS = ("weight", "activation", "subset", "output")


@dataclass(frozen=True)
class Saved:
    """One method on a frozen linear layer of 64 inputs and 48 outputs whose input asks for a gradient too.

    Attributes:
        kept: Numbers of four bytes kept for each token.
        least: Numbers that any backward pass must know of a token: the rank of the derivative of the layer's gradient (of the parameters
            and of the input, for random gradients of the output) by the token.
        fixed: Numbers kept however many tokens there are, beyond the layer's and the adapter's own tensors.
    """

    kept: float
    least: int
    fixed: int


def layer_with(cls: type[Method]) -> nn.Module | None:
    """The layer with the method at its example's size, trained a little; ``None`` where one linear layer is not enough for it."""
    method = example(cls)
    if method.contract not in CONTRACTS:
        return None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).train()
    x = torch.randn(FEW, D_IN)
    try:
        statistics = None
        if any(m.needs for _, m in expanded(method, "0")):
            statistics = exapt.calibrate(model, [(x,)], method, "0", lambda m, b: m(*b).square().mean())
        exapt.attach(model, method, "0", statistics=statistics, seed=0)
        perturb(model)
        model(x)
    except (exapt.InputError, NotImplementedError, RuntimeError, IndexError, ValueError):
        return None
    return model if exapt.trainable(model) else None


def kept_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of distinct storages, the model's own left out, that one forward keeps."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), t)  # with the tensor, so that no storage is freed and its place used again
        return t

    x = torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(tokens)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(n for n, _ in seen.values())


def least(model: nn.Module) -> int:
    """Rank of the derivative by a token of all that the backward pass gives, for two random gradients of the output."""
    model = model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(2, 1, D_OUT, generator=generator, dtype=torch.double)
    at = torch.randn(1, D_IN, generator=generator, dtype=torch.double)

    def given(x: Tensor) -> Tensor:
        found = []
        for dy in gradients:
            torch.manual_seed(0)
            x = x.detach().requires_grad_()
            y = model(x)
            grads = torch.autograd.grad(y, [x, *parameters], dy, allow_unused=True)
            found += [g.flatten() for g in grads if g is not None]
        return torch.cat(found)

    step = 1e-4
    rows = []
    for i in range(D_IN):
        move = torch.zeros_like(at)
        move[0, i] = step
        rows.append((given(at + move) - given(at - move)) / (2 * step))
    values = torch.linalg.svdvals(torch.stack(rows))
    return int((values > 1e-6 * values[0].clamp(min=1e-9)).sum())


def kept(model: nn.Module) -> tuple[float, int]:
    """Numbers of four bytes kept for each token, and however many tokens there are."""
    few, many = kept_bytes(model, FEW), kept_bytes(model, MANY)
    slope = (many - few) / (MANY - FEW)
    return round(slope / 4, 2), round((few - slope * FEW) / 4)


def saved(cls: type[Method]) -> Saved | None:
    """Counts for one method; ``None`` where one linear layer is not enough for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = layer_with(cls)
        if model is None:
            return None
        slope, fixed = kept(model)
        try:
            return Saved(slope, least(model), fixed)
        except exapt.InputError:  # it takes no single token
            return None
