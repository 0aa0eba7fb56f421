"""HyperLLaVA's experts against their formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import exapt
from exapt.methods.hyperllava import HyperLLaVA


@pytest.mark.parametrize(("guide", "tokens"), [("own", 0), ("first", 2)])
def test_against_its_formulas(guide: str, tokens: int) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    exapt.attach(model, HyperLLaVA(bottleneck=2, embedding=3, guide=guide, tokens=tokens), where="?")
    p: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, t in exapt.trainable(model).items():
            t.copy_(torch.randn_like(t))
            p[name[0] + name.rpartition(".")[2]] = t.numpy().astype(float)
    x = torch.randn(3, 4, 5, dtype=torch.double)
    expected, first = x.numpy(), None
    for i, layer in enumerate(model):
        guidance = (expected[:, :tokens] if tokens else expected).mean(1)
        first = guidance if first is None else first
        h = expected @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        rows = []
        for row, g in zip(h, first if guide == "first" else guidance, strict=True):
            e = p[f"{i}W_g"] @ g + p[f"{i}b_g"]
            z = row @ (p[f"{i}H_D"] @ e + p[f"{i}c_D"]).reshape(4, 5).T
            inner = z[:, :2] / (1 + np.exp(-z[:, :2])) * z[:, 2:]
            rows.append(row + inner @ (p[f"{i}H_U"] @ e + p[f"{i}c_U"]).reshape(5, 2).T)
        expected = np.stack(rows)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_with_leading_tokens_as_guides_no_token_sees_a_later_one() -> None:
    model = exapt.attach(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), HyperLLaVA(guide="first", tokens=2), where="?")
    with torch.no_grad():
        for t in exapt.trainable(model).values():
            t.add_(0.3 * torch.randn_like(t))
        x = torch.randn(2, 6, 5)
        other = x.clone()
        other[:, 4:] += 1
        torch.testing.assert_close(model(x)[:, :4], model(other)[:, :4])


def test_one_layer_serves_inputs_that_ask_for_opposite_answers() -> None:
    """A static adapter has one answer for a token; a row's other tokens decide here which it is."""
    x = torch.randn(256, 2, 4)
    x[:, 1] = torch.where(torch.rand(256) < 0.5, 1.0, -1.0)[:, None]
    target = x[:, 1:] * x[:, :1]
    losses = []
    for method in (HyperLLaVA(bottleneck=8), exapt.ParallelAdapter(bottleneck=64)):
        torch.manual_seed(0)
        model = exapt.attach(nn.Sequential(nn.Linear(4, 4)), method, where="0", seed=0)
        optimiser = torch.optim.Adam(exapt.trainable(model).values(), lr=2e-2)
        for _ in range(150):
            loss = (model(x)[:, :1] - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 0.2 * losses[1]


def test_what_it_refuses() -> None:
    with pytest.raises(exapt.InputError, match=r"hyperllava\.bottleneck is 0"):
        exapt.attach(nn.Sequential(nn.Linear(4, 4)), HyperLLaVA(bottleneck=0), where="0")
    model = exapt.attach(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)), HyperLLaVA(guide="first"), where="?")
    with pytest.raises(exapt.InputError, match="choose sites of one width"):
        model(torch.zeros(1, 2, 4))
