"""PESC against its formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax
from torch import Tensor, nn

import exapt
from exapt.methods.pesc import PESC


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = FFN()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def test_against_its_formulas() -> None:
    model, x = Model().double(), torch.randn(3, 4, 6, dtype=torch.double)
    with torch.no_grad():
        h = model(x).numpy().reshape(-1, 6)
    exapt.attach(model, PESC(experts=5, top_k=2, bottleneck=3, scale=0.7, balance=0.3))
    p = {}
    with torch.no_grad():
        for name, t in exapt.trainable(model).items():
            t.copy_(torch.randn_like(t))
            p[name.rpartition(".")[2]] = t.numpy()
    y = model(x)
    flat, expected, load, logits = x.numpy().reshape(-1, 6), np.zeros_like(h), np.zeros(5), []
    for n, (token, out) in enumerate(zip(flat, h, strict=True)):
        scores = p["R"] @ token
        logits.append(scores)
        chosen = np.argsort(-scores)[:2]
        gates = softmax(scores[chosen])
        load[chosen] += 1
        for g, i in zip(gates, chosen, strict=True):
            inner = p["D"][i] @ out
            inner = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
            expected[n] += g * (out + 0.7 * p["U"][i] @ inner)
    np.testing.assert_allclose(y.detach().numpy().reshape(-1, 6), expected, rtol=1e-6)
    load /= 2 * len(flat)
    np.testing.assert_allclose(exapt.noted(model)["mlp"]["load"].numpy(), load, rtol=1e-6)
    balance = 0.3 * 5 * (load * softmax(np.array(logits), -1).mean(0)).sum()
    np.testing.assert_allclose(float(exapt.penalty(model).detach()), balance, rtol=1e-5)


def test_the_penalty_spreads_the_load() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(200, 6) + 1
    exapt.attach(model, PESC(experts=4, top_k=1, bottleneck=2, balance=1.0))
    spread = []
    optimiser = torch.optim.Adam(exapt.trainable(model).values(), lr=0.02)
    for _ in range(200):
        model(x)
        spread.append(float(exapt.noted(model)["mlp"]["load"].max()))
        optimiser.zero_grad()
        exapt.penalty(model).backward()
        optimiser.step()
    assert spread[-1] < 0.4 < spread[0]


def test_what_it_refuses() -> None:
    with pytest.raises(exapt.InputError, match="top_k=9 of 8"):
        exapt.attach(Model(), PESC(top_k=9))
    with pytest.raises(exapt.InputError, match="features last"):
        exapt.attach(nn.Sequential(nn.Conv1d(3, 4, 1)), PESC(), where="all")
    assert exapt.penalty(exapt.attach(Model(), PESC())) is None  # before any call there is nothing to balance
