"""Mixtures that compute only what was chosen against the dense computation of all experts: values, gradients and the work done."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny import perturb
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import exapt
from exapt.core import dispatch

ROWS, LENGTH, D, OUT = 8, 20, 44, 42
ADAPTER = exapt.BottleneckAdapter(bottleneck=3)


class Caller(nn.Module):
    """One layer whose call takes what routers read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, OUT)

    def forward(self, x: Tensor, input_ids: Any = None, task_ids: Any = None) -> Tensor:
        return self.layer(x)


def both(monkeypatch: pytest.MonkeyPatch, method: exapt.Method, **call: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Output and gradients of input and parameters with dispatch and without, and the gates that were dispatched."""
    torch.manual_seed(0)
    model = exapt.attach(Caller().double(), method, where="layer")
    perturb(model, 0.5)
    for p in model.parameters():
        p.data = p.data.double()
    x = torch.randn(ROWS, LENGTH, D, dtype=torch.float64)
    seen: list[Tensor] = []

    def run() -> list[Tensor]:
        own = x.clone().requires_grad_()
        y = model(own, **call)
        parameters = list(exapt.trainable(model).values())
        return [y.detach(), *torch.autograd.grad(y.square().sum() + y.sin().sum(), [own, *parameters])]

    original = dispatch.dispatched

    def spied(gates: Tensor, *rest: Any) -> Tensor:
        seen.append(gates.detach())
        return original(gates, *rest)

    users = dispatch, sys.modules[exapt.Mixture.__module__]
    for module in users:
        monkeypatch.setattr(module, "dispatched", spied)
    sparse = run()
    for module in users:
        monkeypatch.setattr(module, "dispatches", lambda gates: False)
    return sparse, run(), seen


@pytest.mark.parametrize(
    ("method", "share"),
    [
        (exapt.Mixture(exapt.LoRA(rank=40), experts=8, router="token", top_k=2), 2 / 8),
        (exapt.Mixture(exapt.LoRA(rank=40), experts=8, router="token", top_k=1, normalise="before"), 1 / 8),
        (exapt.Mixture(exapt.LoRA(rank=40), experts=8, router="instance", top_k=2), 2 / 8),
        (exapt.Mixture(exapt.LoRA(rank=40), experts=8, router="hash"), 1 / 8),
        (exapt.Mixture(exapt.DoRA(rank=2), experts=4, router="token", top_k=2), 2 / 4),
        (exapt.Mixture(exapt.DoRA(rank=2), experts=4, router="instance", top_k=2), 2 / 4),
        (exapt.Mixture(exapt.HRA(rank=2), experts=4, router="token", top_k=2, normalise="before"), 2 / 4),
        (exapt.Mixture(exapt.IA3(), experts=4, router="token", top_p=0.4), None),
        (exapt.ActivationMixture(ADAPTER, experts=8, top_k=2), 2 / 8),
        (exapt.ActivationMixture(ADAPTER, experts=4, router="instance", top_k=3), 3 / 4),
        (exapt.ActivationMixture(exapt.LoReFT(rank=2), experts=4, router="fixed"), 1 / 4),
        (exapt.MoLA(groups=(8,), rank=40, top_k=2), 2 / 8),
    ],
    ids=lambda v: f"{v.key}-{getattr(getattr(v, 'expert', None), 'key', '')}-{getattr(v, 'router', '')}" if isinstance(v, exapt.Method) else "",
)
def test_dispatch_is_the_dense_sum(monkeypatch: pytest.MonkeyPatch, method: exapt.Method, share: float | None) -> None:
    call = {"input_ids": torch.randint(0, 50, (ROWS, LENGTH))} if getattr(method, "router", "") == "hash" else {}
    call |= {"task_ids": torch.randint(0, 4, (ROWS,))} if getattr(method, "router", "") == "fixed" else {}
    sparse, dense, seen = both(monkeypatch, method, **call)
    assert len(seen) == 1
    mean = float(seen[0].ne(0).double().mean())
    assert mean == pytest.approx(share) if share else 0 < mean < 1
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert sum(float(g.abs().sum()) for g in dense[2:]) > 0


def test_xlora_with_top_k_is_the_dense_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.rand(ROWS, LENGTH, 1, 8, dtype=torch.float64)
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((ROWS, LENGTH, D), (8, 40, D), (8, OUT, 40)))
    p = {"A": a, "B": b, "place": torch.tensor([0]), "call.scalings": given}
    method, h = exapt.XLoRA(experts=8, rank=40, top_k=2), torch.zeros(ROWS, LENGTH, OUT, dtype=torch.float64)

    def run() -> list[Tensor]:
        y = method.apply(p, x, h)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, a, b])]

    sparse = run()
    monkeypatch.setattr(dispatch, "dispatches", lambda gates: False)
    for one, other in zip(sparse, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [8, 64])
def test_it_computes_less_where_that_pays(rank: int) -> None:
    x, gates = torch.randn(256, 32), dispatch.select(torch.randn(256, 8), 2, 1.0, "after")
    a, b = torch.randn(8, rank, 32), torch.randn(8, 32, rank)
    with FlopCounterMode(display=False) as counter:
        dispatch.low_rank_experts(x, gates, a, b, 2)
    every = 2 * 256 * 8 * rank * 64
    assert counter.get_total_flops() == (every if rank == 8 else every // 4)


def test_experts_that_nobody_chose_get_no_gradient_and_no_error() -> None:
    gates = torch.zeros(200, 8)
    gates[:, 3] = 1.0
    x, a, b = torch.randn(200, 4), torch.randn(8, 40, 4, requires_grad=True), torch.randn(8, 5, 40)
    y = dispatch.low_rank_experts(x, gates, a, b, 1)
    torch.testing.assert_close(y, x @ a[3].T @ b[3].T, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(y.sum(), a)
    assert found.flatten(1).abs().sum(1).nonzero().flatten().tolist() == [3]
    assert dispatch.dispatched(torch.zeros(3, 2), (torch.ones(3, 4),), lambda e, x: x).abs().sum() == 0


def test_compiled_and_batched_by_vmap_it_is_the_same() -> None:
    torch.manual_seed(0)
    model = exapt.attach(Caller(), exapt.Mixture(exapt.DoRA(rank=2), experts=4, router="token", top_k=2), where="layer")
    perturb(model, 0.5)
    x = torch.randn(ROWS, LENGTH, D)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.vmap(lambda t: model(t[None])[0], randomness="error")(x), model(x), rtol=1e-5, atol=1e-6)
