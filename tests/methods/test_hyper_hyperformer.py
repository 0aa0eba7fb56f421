"""HyperFormer against its formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exapt
from exapt.methods.hyperformer import HyperFormer

D, ROWS = 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ffn = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.attn(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def norm(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def emitted(p: dict[str, np.ndarray], name: str, e: np.ndarray, group: int) -> np.ndarray:
    return p[name][group] @ e + p[f"c_{name}"][group]


def by_formula(model: nn.Module, x: np.ndarray, tasks: np.ndarray, share: str, p: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
    h = x.copy()
    for layer, block in enumerate(model.layers):
        for position, name in enumerate(("attn", "ffn")):
            lin = getattr(block, name)
            h = h @ lin.weight.detach().numpy().T + lin.bias.detach().numpy()
            own = {**p["shared"], **p[f"layers.{layer}.{name}"]}
            out = h.copy()
            for row, task in enumerate(tasks):
                parts = [own["z"][task]] + ([own["l"][layer]] if share != "none" else []) + ([own["s"][position]] if share == "all" else [])
                e = own["I_2"] @ np.maximum(own["I_1"] @ np.concatenate(parts) + own["c_1"], 0) + own["c_2"]
                if share != "none":
                    e = norm(e, 1e-6) * own["n_e"] + own["m_e"]
                group = position if share == "position" else 0
                down = emitted(own, "D", e, group).reshape(-1, D)
                up = emitted(own, "U", e, group).reshape(D, -1)
                inner = h[row] @ down.T + emitted(own, "b_D", e, group)
                inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
                a = norm(inner @ up.T + emitted(own, "b_U", e, group), 1e-5)
                out[row] = h[row] + emitted(own, "gamma", e, group) * a + emitted(own, "beta", e, group)
            h = out
    return h


@pytest.mark.parametrize("share", ["all", "position", "none"])
def test_against_its_formulas(share: str) -> None:
    model = Model().double()
    exapt.attach(model, HyperFormer(n_tasks=3, reduction=2, share=share, embedding=5, hidden=6, projected=4), where="linear")
    p: dict[str, dict[str, np.ndarray]] = {"shared": {}} | {f"layers.{i}.{n}": {} for i in range(2) for n in ("attn", "ffn")}
    with torch.no_grad():
        for name, t in exapt.trainable(model).items():
            t.copy_(0.5 * torch.randn_like(t))
            site = next((s for s in p if name.startswith(f"{s}.")), "shared")
            p[site][name.rpartition(".")[2]] = t.numpy().astype(float)
    assert ("D" in p["shared"]) == (share != "none")
    x, ids = torch.randn(ROWS, 5, D, dtype=torch.double), torch.tensor([2, 0, 1, 2])
    expected = by_formula(model, x.numpy(), ids.numpy(), share, p)
    np.testing.assert_allclose(model(x, task_ids=ids).detach().numpy(), expected, rtol=2e-5, atol=2e-6)
    with torch.no_grad():  # tasks do differ, and a row alone is what it is in a batch
        assert not torch.allclose(model(x, task_ids=ids), model(x, task_ids=ids.flip(0)), atol=1e-3)
        torch.testing.assert_close(model(x[1:2], task_ids=ids[1:2]), model(x, task_ids=ids)[1:2], rtol=1e-5, atol=1e-6)


def test_parameters_do_not_grow_with_the_layers_but_by_an_embedding() -> None:
    counts = []
    for layers in (2, 4):
        model = nn.Sequential(*[nn.Sequential(nn.Linear(D, D)) for _ in range(layers)])
        exapt.attach(model, HyperFormer(reduction=2, embedding=6), where="*.0")
        counts.append(exapt.parameter_count(model).trainable)
    assert counts[1] - counts[0] == 2 * 6


def test_a_task_learns_beside_another() -> None:
    """Two tasks that ask the opposite of one model: emitted adapters serve both, which one adapter cannot."""
    x = torch.randn(64, 6, D)
    ids = torch.arange(64) % 2
    target = torch.where(ids == 0, 1.0, -1.0)[:, None] * x.mean((1, 2))[:, None]
    losses = {}
    for n_tasks in (1, 2):
        torch.manual_seed(1)
        model, head = Model(), torch.full((D,), 1 / D)
        exapt.attach(model, HyperFormer(n_tasks=n_tasks, reduction=2), where="linear", seed=0)
        optimiser = torch.optim.Adam(exapt.trainable(model).values(), lr=5e-3)
        for _ in range(80):
            given = {"task_ids": ids} if n_tasks == 2 else {}
            loss = (model(x, **given).mean(1) @ head - target[:, 0]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses[n_tasks] = float(loss.detach())
    assert losses[2] < 0.5 * losses[1]


def test_what_it_refuses() -> None:
    with pytest.raises(exapt.InputError, match="one width"):
        exapt.attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), HyperFormer(reduction=2), where="all")
    with pytest.raises(exapt.InputError, match="reduction is 9"):
        exapt.attach(Model(), HyperFormer(reduction=9), where="linear")
    model = exapt.attach(Model(), HyperFormer(n_tasks=2, reduction=2), where="linear")
    with pytest.raises(exapt.InputError, match="from 0 to 2"):
        model(torch.randn(2, 3, D), task_ids=torch.tensor([0, 2]))
    with pytest.raises(exapt.InputError, match="one id per row"):
        model(torch.randn(2, 3, D), task_ids=torch.tensor([0]))
