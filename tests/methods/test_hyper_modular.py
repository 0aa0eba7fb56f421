"""Modular experts against their formulas in NumPy, what their loss makes of tasks, and one task's part taken out."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

import exapt
from exapt.algebra.hyper.modular import add_experts, of_task, prune_experts
from exapt.methods.modular_experts import ModularExperts, mutual_information

D, OUT, E, TASKS = 6, 5, 4, 3


def drawn(method: ModularExperts, size: float = 0.7) -> tuple[nn.Module, dict[str, Tensor]]:
    model = exapt.attach(nn.Linear(D, OUT).double(), method, where="all", seed=0)
    p = {n.rpartition(".")[2]: t for n, t in exapt.trainable(model).items()}
    with torch.no_grad():
        for t in p.values():
            t.data = size * torch.randn(t.shape, dtype=torch.double, generator=torch.Generator().manual_seed(t.numel()))
    return model, p


@pytest.mark.parametrize("normalise", ["before", "after"])
@pytest.mark.parametrize("dense", [False, True])
def test_against_its_formulas(monkeypatch: pytest.MonkeyPatch, normalise: str, dense: bool) -> None:
    model, p = drawn(ModularExperts(TASKS, E, 2, 3, information=0.3, normalise=normalise))  # type: ignore[arg-type]
    if dense:
        monkeypatch.setattr(sys.modules[ModularExperts.__module__], "dispatches", lambda gates: False)
    x, ids = torch.randn(5, 2, D, dtype=torch.double), torch.tensor([2, 0, 2, 1, 0])
    y = model(x, task_ids=ids)
    n = {k: t.detach().numpy() for k, t in p.items()}
    expected = nn.functional.linear(x, model.weight, model.bias).detach().numpy()
    joint, load = np.zeros((TASKS, E)), np.zeros((TASKS, E))
    for i, j in np.ndindex(5, 2):
        t, row = int(ids[i]), x[i, j].numpy()
        g = softmax(n["R"][:, t] @ row)
        chosen = np.argsort(-g)[:2]
        for e in chosen:
            inner = n["D"][e] @ row + n["c"][e]
            share = g[e] / (g[chosen].sum() if normalise == "after" else 1)
            expected[i, j] += share * n["U"][e] @ (inner * (1 + erf(inner / 2**0.5)) / 2)
            load[t, e] += 1 / (2 * int((ids == t).sum()))
        joint[t] += g / 10
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(exapt.noted(model)[""]["load"].numpy(), load)
    info = (joint * np.log(joint / joint.sum(1, keepdims=True) / joint.sum(0))).sum()
    np.testing.assert_allclose(float(exapt.penalty(model).detach()), -0.3 * info, rtol=1e-8)


def test_information_is_scikit_learns() -> None:
    counts = np.random.default_rng(0).integers(1, 9, (3, 4))
    found = mutual_information(torch.tensor(counts / counts.sum()))
    np.testing.assert_allclose(float(found), mutual_info_score(None, None, contingency=counts), rtol=1e-10)


def learned(information: float) -> float:
    """Bits that a trained router's gates tell of the task, of the one that there is."""
    model = exapt.attach(nn.Linear(D, OUT), ModularExperts(2, 8, 2, 4, information=information), where="all", seed=0)
    optimiser = torch.optim.Adam(exapt.trainable(model).values(), 2e-2)
    g, maps = torch.Generator().manual_seed(0), torch.randn(2, OUT, D, generator=torch.Generator().manual_seed(1))
    for _ in range(120):
        ids, x = torch.randint(2, (32,), generator=g), torch.randn(32, D, generator=g) + 0.5
        target = nn.functional.linear(x, model.weight, model.bias) + 0.3 * torch.einsum("nod,nd->no", maps[ids], x)
        loss = (model(x, task_ids=ids) - target.detach()).square().mean()
        loss = loss + exapt.penalty(model) if information else loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model(torch.randn(400, D, generator=g) + 0.5, task_ids=torch.arange(400) % 2)
    return float(mutual_information(exapt.noted(model)[""]["joint"])) / float(np.log(2))


def test_the_loss_gives_tasks_experts_of_their_own() -> None:
    assert learned(1.0) > learned(0.0) + 0.2


def test_a_tasks_own_experts_stand_alone_and_grow() -> None:
    model, p = drawn(ModularExperts(TASKS, 8, 2, 3, normalise="after"))
    with torch.no_grad():
        p["R"][:, :, 0] += 6 * torch.randn(8, TASKS, dtype=torch.double, generator=torch.Generator().manual_seed(5))
    x = torch.randn(30, D, dtype=torch.double) * 0.3
    x[:, 0] = 1.0
    y = model(x, task_ids=torch.ones(30, dtype=torch.long)).detach()
    tensors = of_task({k: t.detach() for k, t in p.items()}, 1)
    left, kept = prune_experts(tensors, exapt.noted(model)[""]["load"][1], threshold=1e-6, least=2)
    assert 2 <= len(kept) < 8

    def alone(own: dict[str, Tensor]) -> nn.Module:
        small = exapt.attach(nn.Linear(D, OUT).double(), ModularExperts(1, len(own["R"]), 2, 3, normalise="after"), where="all")
        small.load_state_dict(exapt.detach(model).state_dict() if exapt.adapters(model) else model.state_dict(), strict=False)
        for n, t in exapt.trainable(small).items():
            t.data = own[n.rpartition(".")[2]].clone()
        return small

    torch.testing.assert_close(alone(left)(x), y)
    grown = add_experts(left, [0])
    grown["R"][-1] -= 1e3 * torch.nn.functional.one_hot(torch.tensor(0), D)  # a new expert that no token asks for yet
    torch.testing.assert_close(alone(grown)(x), y)


def test_what_it_refuses() -> None:
    with pytest.raises(exapt.InputError, match="top_k=5 of 4 experts"):
        exapt.attach(nn.Linear(4, 4), ModularExperts(experts=4, top_k=5), where="all")
    with pytest.raises(exapt.InputError, match="reads task_ids"):
        exapt.attach(nn.Linear(4, 4), ModularExperts(n_tasks=2), where="all")(torch.zeros(2, 4))
    with pytest.raises(exapt.InputError, match="needs features last"):
        exapt.attach(nn.Conv2d(3, 4, 3), ModularExperts(), where="all")
    with pytest.raises(exapt.InputError, match="task 3 was asked for"):
        of_task({"R": torch.zeros(2, 3, 4)}, 3)
