"""Domain-routed experts and partial LoRA against their formulas in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import exapt
from exapt.methods.partial_lora import PartialLoRA
from exapt.methods.upcycled import Upcycled


def test_each_row_goes_through_its_domains_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    exapt.attach(model, Upcycled(experts=3), where=("0", "2"))
    x, ids = torch.randn(4, 6, 4, dtype=torch.double), torch.tensor([2, 0, 1, 2])
    with torch.no_grad():
        base = torch.relu(x @ model[0].weight.T + model[0].bias) @ model[2].weight.T
        torch.testing.assert_close(model(x, task_ids=ids), base)  # copies start equal
        p = {n[0] + n.rpartition(".")[2]: t.copy_(torch.randn_like(t)).double().numpy() for n, t in exapt.trainable(model).items()}
    assert set(p) == {"0D", "0d", "2D"}
    for row, n in zip(range(4), ids.tolist(), strict=True):
        h = x[row].numpy() @ (model[0].weight.detach().numpy() + p["0D"][n]).T + model[0].bias.detach().numpy() + p["0d"][n]
        expected = np.maximum(h, 0) @ (model[2].weight.detach().numpy() + p["2D"][n]).T
        np.testing.assert_allclose(model(x, task_ids=ids)[row].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_one_model_of_experts_serves_domains_that_contradict_each_other(data: Path) -> None:
    """Digits, and digits whose labels run backwards: shared weights cannot serve both, a copy for each can (real digits)."""
    with np.load(data / "mnist" / "mnist.npz") as f:
        x = torch.tensor(f["x_train"][:1500], dtype=torch.float32).flatten(1) / 255
        y = torch.tensor(f["y_train"][:1500], dtype=torch.long)
    domain = torch.randint(2, (1500,))
    y = torch.where(domain == 0, y, 9 - y)
    accuracy = {}
    for experts in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
        exapt.attach(model, Upcycled(experts=experts), where=("0", "2"))
        optimiser = torch.optim.Adam(exapt.trainable(model).values(), lr=3e-3)
        given = (lambda rows: {"task_ids": domain[rows]}) if experts == 2 else (lambda rows: {})
        for step in range(60):
            rows = torch.arange(step * 100, step * 100 + 100) % 1000
            loss = nn.functional.cross_entropy(model(x[rows], **given(rows)), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        rows = torch.arange(1000, 1500)
        with torch.no_grad():
            accuracy[experts] = float((model(x[rows], **given(rows)).argmax(1) == y[rows]).float().mean())
    assert accuracy[2] > 0.75 > 0.6 > accuracy[1]


def test_partial_lora_touches_its_modality_only() -> None:
    layer = nn.Linear(4, 3).double()
    model = exapt.attach(nn.Sequential(layer), PartialLoRA(rank=2, alpha=3), where="0")
    x, types = torch.randn(2, 5, 4, dtype=torch.double), torch.tensor([[0, 0, 1, 1, 0], [1, 0, 0, 2, 1]])
    with torch.no_grad():
        p = {n.rpartition(".")[2]: t.copy_(torch.randn_like(t)).double().numpy() for n, t in exapt.trainable(model).items()}
        text = x.numpy() @ layer.weight.numpy().T + layer.bias.numpy()
        new = text + 1.5 * x.numpy() @ (p["B"] @ p["A"]).T
        y = model(x, token_type_ids=types).numpy()
    np.testing.assert_allclose(y, np.where((types.numpy() == 1)[..., None], new, text), rtol=1e-6)
    with torch.no_grad(), exapt.disabled(model):
        assert np.array_equal(y[types != 1], model(x).numpy()[types != 1])  # text bit for bit


def test_what_they_refuse() -> None:
    conv = nn.Sequential(nn.Conv1d(3, 4, 1))
    with pytest.raises(exapt.InputError, match="linear layers only"):
        exapt.attach(conv, Upcycled(experts=2), where="0")
    with pytest.raises(exapt.InputError, match="linear layers only"):
        exapt.attach(conv, PartialLoRA(rank=1), where="0")
    model = exapt.attach(nn.Sequential(nn.Linear(3, 4)), Upcycled(experts=2), where="0")
    with pytest.raises(exapt.InputError, match="it has 2 experts"):
        model(torch.zeros(1, 3), task_ids=torch.tensor([2]))
    with pytest.raises(exapt.InputError, match="one id per row"):
        model(torch.zeros(2, 3), task_ids=torch.tensor([1]))
