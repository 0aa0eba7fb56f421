"""Mixtures of experts against loops over tokens and experts in NumPy, and against the experts attached one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import inputs_of, model_of, perturb
from torch import Tensor, nn

import exapt
from exapt.core.state import penalty

ROWS, LENGTH, D, OUT, E = 3, 5, 6, 4, 4
Array = NDArray[np.float64]


class Caller(nn.Module):
    """One layer whose call takes token ids and types beside its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, input_ids: Any = None, token_type_ids: Any = None, attention_mask: Any = None) -> Tensor:
        return self.layer(x)


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


def gates_of(logits: Array, top_k: int = 0, top_p: float = 1.0, normalise: str = "after") -> Array:
    """One token's gates, from the definition: walk down the ranks until enough are chosen."""
    p, chosen, held = softmax(logits), [], 0.0
    for e in np.argsort(-p, kind="stable"):
        if (top_k and len(chosen) == top_k) or held >= top_p:
            break
        chosen.append(e)
        held += p[e]
    g = np.zeros_like(p)
    for e in chosen:
        g[e] = p[e] if normalise == "before" else p[e] / held
    return g


def mixed(expert: Any = None, **options: Any) -> tuple[nn.Module, dict[str, Array]]:
    layer = nn.Linear(D, OUT).double()
    method = exapt.Mixture(expert or exapt.LoRA(rank=2, alpha=3.0), **{"experts": E, **options})
    model = exapt.attach(Caller(layer), method, where="layer")
    perturb(model, 0.7)
    held = {n.rpartition(".")[2]: p.detach().numpy() for n, p in model.named_parameters() if "exapt" in n}
    return model, {**held, "W": layer.weight.detach().numpy(), "b": layer.bias.detach().numpy()}


def loop(t: dict[str, Array], x: Array, gates: Array) -> Array:
    """Every token and every LoRA expert on its own; gates (rows, length, experts)."""
    y = np.empty((*x.shape[:-1], OUT))
    for i in np.ndindex(x.shape[:-1]):
        y[i] = t["W"] @ x[i] + t["b"]
        for e in range(E):
            y[i] += gates[i][e] * 1.5 * t["expert_B"][e] @ (t["expert_A"][e] @ x[i])
    return y


def inputs() -> Tensor:
    return torch.randn(ROWS, LENGTH, D, dtype=torch.float64)


@pytest.mark.parametrize(
    "chosen", [{}, {"top_k": 2}, {"top_k": 2, "normalise": "before"}, {"top_k": 1, "normalise": "before"}, {"top_p": 0.6}, {"top_k": 2, "top_p": 0.4}]
)
def test_token_router(chosen: dict[str, Any]) -> None:
    model, t = mixed(router="token", **chosen)
    x = inputs()
    gates = np.apply_along_axis(lambda v: gates_of(t["router"] @ v, **chosen), -1, x.numpy())
    np.testing.assert_allclose(model(x).detach().numpy(), loop(t, x.numpy(), gates), rtol=1e-10)
    if chosen.get("top_k"):
        assert ((gates > 0).sum(-1) <= chosen["top_k"]).all()


def test_instance_router_pools_what_the_mask_keeps() -> None:
    model, t = mixed(router="instance", top_k=2)
    x, mask = inputs(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    for given, keep in (({}, np.ones((ROWS, LENGTH))), ({"attention_mask": mask}, mask.numpy())):
        means = (x.numpy() * keep[..., None]).sum(1) / keep.sum(1, keepdims=True)
        gates = np.repeat(np.stack([gates_of(t["router"] @ m, 2) for m in means])[:, None], LENGTH, 1)
        np.testing.assert_allclose(model(x, **given).detach().numpy(), loop(t, x.numpy(), gates), rtol=1e-10)


def test_task_routers() -> None:
    x, ids = inputs(), torch.tensor([1, 0, 2])
    model, t = mixed(router="task", tasks=3)
    gates = np.repeat(np.stack([gates_of(t["Z"][i]) for i in ids])[:, None], LENGTH, 1)
    np.testing.assert_allclose(model(x, task_ids=ids).detach().numpy(), loop(t, x.numpy(), gates), rtol=1e-10)
    model, t = mixed(router="fixed")
    gates = np.repeat(np.eye(E)[ids][:, None], LENGTH, 1)
    np.testing.assert_allclose(model(x, task_ids=ids).detach().numpy(), loop(t, x.numpy(), gates), rtol=1e-10)


def test_modality_and_hash_routers() -> None:
    x, ids = inputs(), torch.randint(E, (ROWS, LENGTH))
    model, t = mixed(router="modality")
    np.testing.assert_allclose(model(x, token_type_ids=ids).detach().numpy(), loop(t, x.numpy(), np.eye(E)[ids]), rtol=1e-10)
    np.testing.assert_allclose(model(x).detach().numpy(), loop(t, x.numpy(), np.eye(E)[0 * ids]), rtol=1e-10)

    model, t = mixed(router="hash")
    x = inputs()[:1, :1].expand(20, 50, D).contiguous()  # one and the same token: the output tells its expert
    ids = torch.arange(1000).view(20, 50)
    alone = np.stack([loop(t, x.numpy()[:1, :1], np.eye(E)[np.full((1, 1), e)])[0, 0] for e in range(E)])
    y = model(x, input_ids=ids).detach().numpy().reshape(1000, OUT)
    distances = np.abs(y[:, None] - alone).max(-1)
    assert (distances.min(1) < 1e-12).all()
    assert np.bincount(distances.argmin(1)).min() > 180  # of 250 each
    assert torch.equal(model(x, input_ids=ids.flip(0)).flip(0), model(x, input_ids=ids))


@pytest.mark.parametrize("key", ["lora", "dora", "hira", "loha", "boft", "hra", "vera", "ia3", "full", "shira", "lokr", "lora_xs"])
def test_any_weight_method_is_an_expert(key: str) -> None:
    small = {
        "dora": {"rank": 2},
        "hira": {"rank": 2},
        "loha": {"rank": 2},
        "boft": {"block_size": 2},
        "hra": {"rank": 2},
        "lora_xs": {"rank": 2},
        "shira": {"rank": 1},
    }
    cls = exapt.methods()[key]
    if not issubclass(cls, exapt.WeightMethod):
        with pytest.raises(exapt.InputError, match="must change a matrix"):
            exapt.Mixture(cls())
        return
    expert = cls(**small.get(key, {}))
    layer = nn.Linear(8, 8).double()
    model = exapt.attach(Caller(layer), exapt.Mixture(expert, experts=3, router="token"), where="layer", name="m", seed=0)
    perturb(model, 0.3)
    holder = layer.exapt.m  # type: ignore[union-attr]
    held = dict(holder.named_parameters()) | dict(holder.named_buffers())
    common = {n.rpartition(".")[2]: t for n, t in [*model.named_parameters(), *model.named_buffers()] if ".m_shared_" in n or n.startswith("exapt.m_shared")}
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y = model(x)
    with exapt.disabled(model):
        base = model(x)
    expected = base.clone()
    gates = torch.softmax(x @ held["router"].T, -1)
    for e in range(3):
        single = exapt.attach(Caller(nn.Linear(8, 8).double()), expert, where="layer", name="s", seed=0)
        single.layer.load_state_dict({k: v for k, v in layer.state_dict().items() if "exapt" not in k}, strict=False)  # type: ignore[union-attr]
        with torch.no_grad():
            for n, t in [*single.named_parameters(), *single.named_buffers()]:
                name = n.rpartition(".")[2]
                if ".s." in n:
                    t.copy_(held[f"expert_{name}"][e])
                elif "s_shared" in n:
                    t.copy_(common[name])
        expected = expected + gates[..., e : e + 1] * (single(x) - base)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert (y - base).abs().max() > 1e-3


def test_low_rank_experts_run_the_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    real = torch.nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (runs.append(len(x)), real(self, x))[1])
    model, _ = mixed(router="token", top_k=2)
    model(inputs())
    assert runs == [ROWS]


@pytest.mark.parametrize("expert", [exapt.LoRA(rank=2), exapt.DoRA(rank=2)])
def test_one_expert_is_the_plain_method(expert: Any) -> None:
    x = inputs()
    layer = nn.Linear(D, OUT).double()
    plain = exapt.attach(Caller(layer), expert, where="layer", seed=0)
    perturb(plain, 0.4)
    tensors = [p.detach().clone() for p in exapt.trainable(plain).values()]
    expected = plain(x).detach()
    exapt.detach(plain)
    model = exapt.attach(plain, exapt.Mixture(expert, experts=1, router="token"), where="layer", seed=0)
    with torch.no_grad():
        for p, t in zip([p for n, p in exapt.trainable(model).items() if "expert_" in n], tensors, strict=True):
            p.copy_(t[None])
    torch.testing.assert_close(model(x), expected)


def test_losses_and_statistics() -> None:
    model, t = mixed(router="token", top_k=2, balance=0.3, z=0.1)
    x = inputs()
    model(x)
    logits = (x.numpy() @ t["router"].T).reshape(-1, E)
    p = np.stack([softmax(z) for z in logits])
    f = np.stack([gates_of(z, 2) > 0 for z in logits]).mean(0)
    lse = np.log(np.exp(logits).sum(1))
    expected = 0.3 * E * (f * p.mean(0)).sum() + 0.1 * (lse**2).mean()
    loss = penalty(model)
    assert loss is not None
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-10)
    seen = exapt.noted(model)["layer"]
    np.testing.assert_allclose(seen["load"].numpy(), f, rtol=1e-12)
    np.testing.assert_allclose(seen["importance"].numpy(), p.mean(0), rtol=1e-12)
    np.testing.assert_allclose(seen["entropy"].item(), -(p * np.log(p)).sum(1).mean(), rtol=1e-12)
    loss.backward()
    got = {n.rpartition(".")[2]: g.grad is not None and bool(g.grad.abs().sum() > 0) for n, g in exapt.trainable(model).items()}
    assert got == {"expert_A": False, "expert_B": False, "router": True}


def test_balancing_spreads_the_load() -> None:
    spread = []
    for balance in (0.0, 5.0):
        torch.manual_seed(0)
        model, _ = mixed(router="token", top_k=1, normalise="before", balance=balance)
        x = inputs().repeat(4, 1, 1) + 1.0
        optimiser = torch.optim.Adam(exapt.trainable(model).values(), lr=0.05)
        for _ in range(60):
            optimiser.zero_grad()
            loss = model(x).square().mean() + (penalty(model) if balance else 0.0)
            loss.backward()
            optimiser.step()
        model(x)
        spread.append(exapt.noted(model)["layer"]["load"].max().item())
    assert spread[1] < spread[0]


def test_convolutions_route_by_task() -> None:
    model = exapt.attach(Caller(nn.Conv2d(3, 4, 3)), exapt.Mixture(exapt.LoRA(rank=2), router="fixed", experts=2), where="layer")
    perturb(model, 0.5)
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        y = model(x, task_ids=torch.tensor([0, 1, 1, 0]))
        for task, rows in ((0, [0, 3]), (1, [1, 2])):
            torch.testing.assert_close(y[rows], model(x, task_ids=torch.full((4,), task))[rows])
    assert (y - model(x, task_ids=torch.tensor([1, 0, 0, 1]))).abs().amax((1, 2, 3)).min() > 1e-3


def test_activation_experts() -> None:
    expert = exapt.BottleneckAdapter(bottleneck=2, activation="relu")
    layer = nn.Linear(D, OUT).double()
    model = exapt.attach(layer, exapt.ActivationMixture(expert, experts=3, top_k=2), where="all")
    perturb(model, 0.7)
    t = {n.rpartition(".")[2]: p.detach().numpy() for n, p in exapt.trainable(model).items()}
    x = torch.randn(2, 3, D, dtype=torch.float64)
    h = x.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    expected = h.copy()
    for i in np.ndindex(h.shape[:-1]):
        g = gates_of(t["router"] @ h[i], 2)
        for e in range(3):
            inner = np.maximum(t["expert_W_down"][e] @ h[i] + t["expert_b_down"][e], 0)
            expected[i] += g[e] * (t["expert_W_up"][e] @ inner + t["expert_b_up"][e])
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9)


CONFIGURATIONS = [
    exapt.Mixture(exapt.LoRA(rank=2), router="token", top_k=2), exapt.Mixture(exapt.DoRA(rank=2), router="instance"),
    exapt.Mixture(exapt.HRA(rank=2), router="token"),
    exapt.ActivationMixture(exapt.SSF(), router="instance"),
]  # fmt: skip


@pytest.mark.parametrize("method", CONFIGURATIONS, ids=lambda m: f"{m.key}-{m.expert.key}-{m.router}")
def test_invariants_of_routed_configurations(method: Any, tmp_path: Path) -> None:
    model, x = model_of("text"), inputs_of("text")
    with torch.no_grad():
        before = model(x)
    exapt.attach(model, method, name="a")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=2e-6)
    perturb(model)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in exapt.trainable(model).values())
    with torch.no_grad():
        y = model(x)
        again = exapt.load(model_of("text"), exapt.save(model, tmp_path / "m", name="a"))
        assert torch.equal(again(x), y)
        with exapt.routed(model, ["a", None, "a"]):
            mixed_rows = model(x)
        torch.testing.assert_close(mixed_rows, torch.stack([y[0], before[1], y[2]]), rtol=1e-5, atol=1e-6)
    with pytest.raises(exapt.InputError, match="no merged form"):
        exapt.merge(model)
    exapt.detach(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 9}, "to the number of experts"), ({"experts": 0}, "at least 1"), ({"top_p": 0.0}, "top_p above 0"),
        ({"router": "token", "top_k": 1}, "normalise='before'"), ({"balance": -1.0}, "not negative"), ({"tasks": 0}, "at least 1"),
        ({"expert": exapt.LoRA(rank=99)}, "takes 1 to"), ({"expert": exapt.AdaLoRA()}, "cannot be an expert"),
    ],
)  # fmt: skip
def test_bad_fields(options: dict[str, Any], match: str) -> None:
    with pytest.raises(exapt.InputError, match=match):
        exapt.attach(nn.Linear(D, OUT), exapt.Mixture(**options), where="all")


def test_bad_use() -> None:
    with pytest.raises(exapt.InputError, match="must change a matrix"):
        exapt.Mixture(exapt.BottleneckAdapter())
    with pytest.raises(exapt.InputError, match="must change a module's output"):
        exapt.ActivationMixture(exapt.LoRA())
    with pytest.raises(exapt.InputError, match="route by task"):
        exapt.attach(nn.Conv2d(3, 4, 3), exapt.Mixture(router="token"), where="all")
    model, _ = mixed(router="fixed")
    with pytest.raises(exapt.InputError, match="task_ids from 0 to 7"):
        model(inputs(), task_ids=torch.tensor([0, 7, 1]))
    with pytest.raises(exapt.InputError, match="one for each"):
        model(inputs(), task_ids=torch.tensor([0]))
    model, _ = mixed(router="modality")
    with pytest.raises(exapt.InputError, match="from 9 to 9"):
        model(inputs(), token_type_ids=torch.full((ROWS, LENGTH), 9))
    with pytest.raises(exapt.InputError, match="one for each"):
        model(inputs(), token_type_ids=torch.zeros(ROWS, 2, dtype=torch.long))
