"""The named mixtures against loops over tokens and experts in NumPy, from their papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import model_of, perturb
from torch import nn

import exapt
from exapt.core.state import penalty
from exapt.methods.mola import depth

Array = NDArray[np.float64]
D, OUT = 6, 4


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


def attached(method: Any, layer: nn.Module | None = None) -> tuple[nn.Module, dict[str, Array]]:
    model = exapt.attach(layer or nn.Linear(D, OUT).double(), method, where="all")
    perturb(model, 0.6)
    held = {n.rpartition(".")[2]: t.detach().numpy() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return model, held


def tokens() -> torch.Tensor:
    return torch.randn(3, 5, D, dtype=torch.float64)


def low_rank(t: dict[str, Array], x: Array, gates: Array, scale: float, a: str = "A", b: str = "B") -> Array:
    y = np.empty((*x.shape[:-1], OUT))
    for i in np.ndindex(x.shape[:-1]):
        y[i] = t["weight"] @ x[i] + t["bias"]
        for e in range(len(t[a])):
            y[i] += gates[i][e] * scale * t[b][e] @ (t[a][e] @ x[i])
    return y


def top(z: Array, k: int) -> Array:
    g = np.zeros_like(z)
    best = np.argsort(-z, kind="stable")[:k]
    g[best] = softmax(z[best])
    return g


def test_mola() -> None:
    model, t = attached(exapt.MoLA(groups=(5,), rank=2, alpha=3.0, top_k=2, balance=0.2))
    x = tokens()
    logits = x.numpy() @ t["router"].T
    gates = np.apply_along_axis(top, -1, logits, 2)
    np.testing.assert_allclose(model(x).detach().numpy(), low_rank(t, x.numpy(), gates, 1.5), rtol=1e-10)
    f = (gates > 0).reshape(-1, 5).mean(0)
    p = np.apply_along_axis(softmax, -1, logits).reshape(-1, 5).mean(0)
    loss = penalty(model)
    assert loss is not None
    np.testing.assert_allclose(loss.item(), 0.2 * 5 * (f * p).sum(), rtol=1e-10)
    np.testing.assert_allclose(exapt.noted(model)[""]["load"].numpy(), f)


@pytest.mark.parametrize(
    ("blocks", "groups", "expected"),
    [(8, (2, 4, 6, 8), [2, 2, 4, 4, 6, 6, 8, 8]), (4, (8, 2), [8, 8, 2, 2]), (3, (2, 4, 6, 8), [2, 4, 6]), (2, (5,), [5, 5])],
)
def test_mola_gives_higher_blocks_their_number(blocks: int, groups: tuple[int, ...], expected: list[int]) -> None:
    model = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(blocks)))
    exapt.attach(model, exapt.MoLA(groups=groups, rank=1), where="*.q")
    assert [len(p) for n, p in exapt.trainable(model).items() if n.endswith("router")] == expected
    assert [depth(n) for n in ("bert.encoder.layer.10.output", "h.3", "head")] == [10, 3, -1]


def test_loramoe() -> None:
    method = exapt.LoRAMoE(experts=4, knowledge=1, rank=2, alpha=3.0, delta=0.4, balance=0.5)
    model, t = attached(method)
    x, kind = tokens(), torch.tensor([0, 1, 1])
    y = model(x)
    assert penalty(model) is None
    gates = np.apply_along_axis(softmax, -1, x.numpy() @ t["router"].T)
    np.testing.assert_allclose(y.detach().numpy(), low_rank(t, x.numpy(), gates, 1.5), rtol=1e-10)

    torch.testing.assert_close(model(x, domain=kind), y)
    z = np.empty((4, 3))
    for e in range(4):
        for m in range(3):
            same = (0 if e < 1 else 1) == int(kind[m])
            z[e, m] = sum(gates[m, i, e] for i in range(5)) * (1.4 if same else 0.6)
    loss = penalty(model)
    assert loss is not None
    np.testing.assert_allclose(loss.item(), 0.5 * z.var() / z.mean(), rtol=1e-10)
    model(x)
    assert penalty(model) is None  # nothing of the call before is left
    with pytest.raises(exapt.InputError, match="one for each"):
        model(x, domain=torch.tensor([0]))


def test_loramoe_parts_the_experts_by_kind() -> None:
    """Minimising the constraint alone lets rows of a kind use their own experts less by (1 - delta) / (1 + delta), evenly within a kind."""
    torch.manual_seed(0)
    model, _ = attached(exapt.LoRAMoE(experts=4, knowledge=2, rank=1, delta=0.5, balance=1.0))
    x, kind = tokens(), torch.tensor([0, 1, 1])
    x[:, :, 0] = torch.where(kind == 0, 3.0, -3.0)[:, None].double()
    router = exapt.trainable(model)["exapt.default.router"]
    optimiser = torch.optim.Adam([router], lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        model(x, domain=kind)
        loss = penalty(model)
        assert loss is not None
        loss.backward()
        optimiser.step()
    model(x, domain=kind)
    q = (x @ router.T).softmax(-1).sum(1).detach()
    own = torch.stack([q[0, :2].mean(), q[1, 2:].mean(), q[2, 2:].mean()])
    other = torch.stack([q[0, 2:].mean(), q[1, :2].mean(), q[2, :2].mean()])
    assert ((own / other - 1 / 3).abs() < 0.1).all()


def test_meteora_trains_its_gates_alone() -> None:
    model = exapt.attach(model_of("text"), exapt.MeteoRA(experts=3, rank=2, top_k=2))
    assert {n.rpartition(".")[2] for n in exapt.trainable(model)} == {"router"}
    site = model.layers[0].attention.query  # type: ignore[union-attr]
    held = site.exapt.default  # type: ignore[union-attr]
    with torch.no_grad():
        held.expert_A.normal_()
        held.expert_B.normal_()
    x = torch.randn(2, 4, 32)
    t = {k: v.detach().double().numpy() for k, v in held.state_dict().items()}
    t |= {"weight": site.weight.detach().double().numpy(), "bias": site.bias.detach().double().numpy()}
    gates = np.apply_along_axis(top, -1, x.double().numpy() @ t["router"].T, 2)
    global OUT
    before, OUT = OUT, 32
    expected = low_rank(t, x.double().numpy(), gates, 8.0, "expert_A", "expert_B")
    OUT = before
    np.testing.assert_allclose(site(x).detach().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_adapter_fusion() -> None:
    expert = exapt.BottleneckAdapter(bottleneck=2, activation="relu")
    model, t = attached(exapt.AdapterFusion(expert, experts=3, regularisation=0.3))
    with torch.no_grad():
        for b in model.buffers():
            b.normal_()
    x = tokens()
    h = x.numpy() @ t["weight"].T + t["bias"]
    expected = h.copy()
    attention = []
    for i in np.ndindex(h.shape[:-1]):
        z = [t["expert_W_up"][n] @ np.maximum(t["expert_W_down"][n] @ h[i] + t["expert_b_down"][n], 0) + t["expert_b_up"][n] for n in range(3)]
        query = t["Q"] @ h[i] + t["b_Q"]
        s = softmax(np.array([query @ (t["K"] @ v + t["b_K"]) for v in z]))
        attention.append(s)
        expected[i] += sum(w * (t["V"] @ v) for w, v in zip(s, z, strict=True))
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(exapt.noted(model)[""]["attention"].numpy(), np.mean(attention, 0), rtol=1e-9)
    loss = penalty(model)
    assert loss is not None
    np.testing.assert_allclose(loss.item(), 0.3 * ((np.eye(OUT) - t["V"]) ** 2).sum(), rtol=1e-10)
    assert set(exapt.trainable(model)) == {f"exapt.default.{k}" for k in ("Q", "K", "V", "b_Q", "b_K")}
    loss = loss + model(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in exapt.trainable(model).values())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: exapt.MoLA(groups=(1, 4), rank=2), "top_k"), (lambda: exapt.MoLA(groups=(), rank=2), "groups"),
        (lambda: exapt.LoRAMoE(knowledge=9), "knowledge"),
        (lambda: exapt.LoRAMoE(delta=2.0), "delta"), (lambda: exapt.AdapterFusion(experts=0), "at least one"),
        (lambda: exapt.AdapterFusion(exapt.LoRA()), "must add"), (lambda: exapt.MoLA(rank=99), "takes 1 to"),
    ],
)  # fmt: skip
def test_bad_fields(make: Any, match: str) -> None:
    with pytest.raises(exapt.InputError, match=match):
        exapt.attach(nn.Linear(D, OUT), make(), where="all")
