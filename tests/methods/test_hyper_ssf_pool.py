"""The pool of SSF modules against its formulas in NumPy, and in a federation of clients whose rows differ."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exapt
from exapt.algebra.federated import federated_average
from exapt.methods.ssf_pool import SSFPool


def test_against_its_formulas() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    exapt.attach(model, SSFPool(pool=6, top_k=2, width=5, weight=0.5), where=("0", "2"))
    p: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, t in exapt.trainable(model).items():
            t.copy_(torch.randn_like(t))
            p[name.split(".")[0] + name.rpartition(".")[2]] = t.numpy().astype(float)
    x, q = torch.randn(4, 7, 5, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)
    y = model(x, queries=q)
    keys = p["exaptkeys"] / np.linalg.norm(p["exaptkeys"], axis=1, keepdims=True)
    cosine = q.numpy() / np.linalg.norm(q.numpy(), axis=1, keepdims=True) @ keys.T
    expected, matched = [], []
    for row, scores in zip(x.numpy(), cosine, strict=True):
        chosen = np.argsort(-scores)[:2]
        matched += scores[chosen].tolist()
        for i in (0, 2):
            row = row @ model[i].weight.detach().numpy().T + model[i].bias.detach().numpy()
            row = row * p[f"{i}gamma"][chosen].mean(0) + p[f"{i}beta"][chosen].mean(0)
            row = np.tanh(row) if i == 0 else row
        expected.append(row)
    np.testing.assert_allclose(y.detach().numpy(), np.stack(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(float(exapt.penalty(model).detach()), 0.5 * (1 - np.mean(matched)), rtol=1e-5)


def test_what_it_refuses() -> None:
    model = exapt.attach(nn.Sequential(nn.Linear(5, 4)), SSFPool(pool=6, width=5), where="0")
    with pytest.raises(exapt.InputError, match=r"need \(2, 5\)"):
        model(torch.zeros(2, 5), queries=torch.zeros(2, 4))
    with pytest.raises(exapt.InputError, match="reads queries"):
        model(torch.zeros(2, 5))
    with pytest.raises(exapt.InputError, match=r"ssf_pool\.pool is 0"):
        exapt.attach(nn.Sequential(nn.Linear(5, 4)), SSFPool(pool=0), where="0")


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, head: bool = False) -> None:
    parameters = list(model.parameters()) if head else list(exapt.trainable(model).values())
    optimiser = torch.optim.Adam(parameters, lr=2e-3 if head else 3e-2)
    for step in range(steps):
        pick = torch.arange(step * 64, step * 64 + 64) % len(x)
        given = {} if head else {"queries": queries(model, x[pick])}
        loss = nn.functional.cross_entropy(model(x[pick], **given), y[pick])
        if not head:
            extra = exapt.penalty(model)
            loss = loss if extra is None else loss + extra
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def queries(model: nn.Module, x: Tensor) -> Tensor:
    """Features of the base model, which are what the pool's keys are matched with."""
    with torch.no_grad(), exapt.disabled(model):
        return torch.tanh(model[0](x))


def test_a_federation_serves_the_rows_of_all_clients(data: Path) -> None:
    """Digits: one client's are negatives, another's are upside down; the averaged pool serves both better than the base model."""
    with np.load(data / "mnist" / "mnist.npz") as f:
        x = torch.tensor(f["x_train"][:4000], dtype=torch.float32).flatten(1) / 255
        y = torch.tensor(f["y_train"][:4000], dtype=torch.long)
    base = nn.Sequential(nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10))
    train(base, x[:2000], y[:2000], 120, head=True)
    shifts = [lambda v: 1 - v, lambda v: v.flip(-1)]
    server = exapt.attach(base, SSFPool(pool=8, top_k=2, width=64), where=("0", "2"), seed=0)
    tests = [(shift(x[3500:]), y[3500:]) for shift in shifts]

    def accuracy(model: nn.Module) -> list[float]:
        with torch.no_grad():
            return [float((model(v, queries=queries(model, v)).argmax(1) == t).float().mean()) for v, t in tests]

    before = accuracy(server)
    for _ in range(3):
        clients = []
        for i, shift in enumerate(shifts):
            client = copy.deepcopy(server)
            part = slice(2000 + 750 * i, 2750 + 750 * i)
            train(client, shift(x[part]), y[part], 25)
            clients.append({n: t.detach() for n, t in exapt.trainable(client).items()})
        merged = federated_average(clients, [750, 750])
        with torch.no_grad():
            for n, t in exapt.trainable(server).items():
                t.copy_(merged[n])
    after = accuracy(server)
    assert all(b > a + 0.1 for a, b in zip(before, after, strict=True)), (before, after)
