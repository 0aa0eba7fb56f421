"""Task-, quality-, sentence- and tree-routed methods against computations in NumPy, from their papers and official code."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import erf
from tiny import inputs_of, model_of, perturb
from torch import Tensor, nn

import exapt
from exapt.algebra.compose.experts import from_adapters
from exapt.core.state import penalty
from exapt.methods.petalface import blend

Array = NDArray[np.float64]
D, OUT = 6, 4


class Caller(nn.Module):
    """Two layers whose call takes what methods read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, OUT)

    def forward(self, x: Tensor, attention_mask: Any = None, token_type_ids: Any = None) -> Tensor:
        return self.two(self.one(x))


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


def attached(method: Any, fill: bool = False) -> tuple[nn.Module, dict[str, Array]]:
    model = exapt.attach(nn.Linear(D, OUT).double(), method, where="all")
    perturb(model, 0.6)
    if fill:
        with torch.no_grad():
            for n, b in model.named_buffers():
                if b.is_floating_point() and not n.endswith("layers"):
                    b.normal_()
    return model, {n.rpartition(".")[2]: t.detach().numpy() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def tokens() -> Tensor:
    return torch.randn(4, 5, D, dtype=torch.float64)


def base(t: dict[str, Array], x: Tensor) -> Array:
    return x.numpy() @ t["weight"].T + t["bias"]


@pytest.mark.parametrize("options", [{"scales": "vector"}, {"scales": "scalar"}, {"scales": "vector", "share": True}])
def test_scalearn(options: dict[str, Any]) -> None:
    model, t = attached(exapt.ScaLearn(exapt.BottleneckAdapter(bottleneck=2, activation="relu"), experts=3, **options), fill=True)
    x = tokens()
    h = base(t, x)
    expected = h.copy()
    for i in np.ndindex(h.shape[:-1]):
        for n in range(3):
            z = t["expert_W_up"][n] @ np.maximum(t["expert_W_down"][n] @ h[i] + t["expert_b_down"][n], 0) + t["expert_b_up"][n]
            expected[i] += t["omega"][n] * z
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9)
    assert t["omega"].shape == (3, 1 if options["scales"] == "scalar" else OUT)


def test_scalearn_shares_its_scales() -> None:
    count = exapt.parameter_count(exapt.attach(model_of("text"), exapt.ScaLearn(experts=8, scales="scalar", share=True)))
    assert count.trainable == 8  # the paper's smallest
    fresh = exapt.trainable(exapt.attach(nn.Linear(D, OUT), exapt.ScaLearn(experts=4, start=2.0), where="all"))["exapt.default.omega"]
    assert (fresh - 0.5).abs().max() < 0.01


def test_mtl_lora() -> None:
    model, t = attached(exapt.MTLLoRA(rank=2, alpha=3.0, n_tasks=3, n_up=2, temperature=0.5))
    x, ids = tokens(), torch.tensor([2, 0, 1, 2])
    expected = base(t, x)
    for b, task in enumerate(ids):
        up = sum(w * m for w, m in zip(softmax(t["z"][task] / 0.5), t["B"], strict=True))
        expected[b] += 1.5 * x[b].numpy() @ (up @ t["Lambda"][task] @ t["A"]).T
    np.testing.assert_allclose(model(x, task_ids=ids).detach().numpy(), expected, rtol=1e-9)
    for bad, match in ((torch.tensor([0]), "one id per row"), (torch.tensor([0, 1, 2, 3]), "from 0 to 3")):
        with pytest.raises(exapt.InputError, match=match):
            model(x, task_ids=bad)


def test_petalface() -> None:
    model, t = attached(exapt.PETALface(rank=2, scale=0.7))
    x, quality = tokens(), torch.tensor([0.9, 0.4, 0.65, 0.15], dtype=torch.float64)
    a = blend(quality, 0.55)
    expected = base(t, x)
    plain = expected.copy()
    for b in range(4):
        low, high = (x[b].numpy() @ (t["B"][i] @ t["A"][i]).T for i in range(2))
        expected[b] += 0.7 * ((0.5 + quality[b].item() - 0.55) * high + (1 - (0.5 + quality[b].item() - 0.55)) * low)
        plain[b] += 0.35 * (high + low)
    np.testing.assert_allclose(model(x, domain=1 - a).detach().numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(model(x).detach().numpy(), plain, rtol=1e-9)
    windows = model(x, domain=torch.tensor([0.0, 1.0]).double())  # two rows of two windows each
    np.testing.assert_allclose(windows.detach().numpy(), model(x, domain=torch.tensor([0.0, 0, 1, 1]).double()).detach().numpy(), rtol=1e-12)
    with pytest.raises(exapt.InputError, match="one number for each"):
        model(x, domain=torch.zeros(3))


def test_context_peft_is_one_lora_for_each_modality() -> None:
    model = Caller().double()
    layers = {n: {k: v.detach().numpy().copy() for k, v in m.state_dict().items()} for n, m in model.named_children()}
    exapt.attach(model, {("one", "two"): exapt.ContextPEFT(groups=2, expert=exapt.LoRA(rank=2, alpha=4.0)).rules()["linear"]})
    perturb(model, 0.5)
    x, kind = tokens(), torch.randint(2, (4, 5))
    h = x.numpy()
    for name, layer in layers.items():
        t = {k.rpartition(".")[2]: v.detach().numpy() for k, v in exapt.trainable(model).items() if k.startswith(name)}
        y = h @ layer["weight"].T + layer["bias"]
        for i in np.ndindex(y.shape[:-1]):
            m = int(kind[i])
            y[i] += 2.0 * t["expert_B"][m] @ (t["expert_A"][m] @ h[i])
        h = y
    np.testing.assert_allclose(model(x, token_type_ids=kind).detach().numpy(), h, rtol=1e-9)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_mixda(pool: Any) -> None:
    model, t = attached(exapt.MixDA(exapt.ParallelAdapter(bottleneck=2, scale=1.0, activation="gelu"), experts=2, width=5, depth=2, pool=pool), fill=True)
    x = tokens()
    h = base(t, x)
    expected = np.empty_like(h)
    for b in range(4):
        z = x[b, -1].numpy() if pool == "last" else x[b].numpy().mean(0)
        for i in range(3):
            z = t[f"gate_W_{i}"] @ (np.maximum(z, 0) if i else z) + t[f"gate_b_{i}"]
        g = softmax(z)
        for s in range(5):
            expected[b, s] = g[0] * h[b, s]
            for k in range(2):
                inner = t["expert_W_down"][k] @ x[b, s].numpy() + t["expert_b_down"][k]
                inner = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
                expected[b, s] += g[k + 1] * (t["expert_W_up"][k] @ inner + t["expert_b_up"][k])
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9)
    assert all("gate_" in n for n in exapt.trainable(model))


@pytest.mark.parametrize("distance", ["kl", "mmd"])
def test_align_lora(distance: Any) -> None:
    model, t = attached(exapt.AlignLoRA(rank=2, alpha=3.0, align=0.2, distance=distance, gamma=0.3))
    x, ids = torch.randn(7, 5, D, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    y = model(x)
    np.testing.assert_allclose(y.detach().numpy(), base(t, x) + 1.5 * x.numpy() @ (t["B"] @ t["A"]).T, rtol=1e-9)
    assert penalty(model) is None
    torch.testing.assert_close(model(x, domain=ids), y)
    z = x.numpy() @ t["A"].T
    found = []
    for u, v in combinations(range(3), 2):
        a, b = z[ids.numpy() == u], z[ids.numpy() == v]
        each = []
        for s in range(5):
            if distance == "kl":
                total = 0.0
                for p, q in ((a, b), (b, a)):
                    mp, mq, vp, vq = p[:, s].mean(0), q[:, s].mean(0), p[:, s].var(0, ddof=1) + 1e-8, q[:, s].var(0, ddof=1) + 1e-8
                    total += 0.5 * (np.log(vq / vp) + vp / vq + (mq - mp) ** 2 / vq - 1).sum()
                each.append(total / 2)
            else:
                k = [np.mean([np.exp(-0.3 * ((i - j) ** 2).sum()) for i in p[:, s] for j in q[:, s]]) for p, q in ((a, a), (b, b), (a, b))]
                each.append(k[0] + k[1] - 2 * k[2])
        found.append(np.mean(each))
    loss = penalty(model)
    assert loss is not None
    np.testing.assert_allclose(loss.item(), 0.2 * np.mean(found), rtol=1e-9)
    model(x)
    assert penalty(model) is None
    with pytest.raises(exapt.InputError, match="its task"):
        model(x, domain=ids[:2])


def test_alignment_draws_tasks_together() -> None:
    torch.manual_seed(0)
    model, _ = attached(exapt.AlignLoRA(rank=2, align=1.0))
    ids = torch.arange(40) % 2
    x = torch.randn(40, D, dtype=torch.float64)
    x[ids == 1, 0] += 4.0
    optimiser = torch.optim.Adam(exapt.trainable(model).values(), lr=0.05)
    losses = []
    for _ in range(150):
        optimiser.zero_grad()
        model(x, domain=ids)
        loss = penalty(model)
        assert loss is not None
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("cls", [exapt.DLPLoRA, exapt.PSEC])
def test_composed_for_the_whole_input(cls: Any) -> None:
    options = {"top_p": 0.6} if cls is exapt.DLPLoRA else {}
    model = Caller().double()
    layers = {n: {k: v.detach().numpy().copy() for k, v in m.state_dict().items()} for n, m in model.named_children()}
    exapt.attach(model, cls(experts=3, rank=2, alpha=3.0, width=5, depth=2, **options), where=("one", "two"))
    perturb(model, 0.8)
    with torch.no_grad():
        for b in model.buffers():
            b.normal_()
    m = {k.rpartition(".")[2]: v.detach().numpy() for k, v in exapt.trainable(model).items()}
    assert set(m) == {"M_0", "c_0", "M_1", "c_1"}
    x, mask = tokens(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    expected = np.empty((4, 5, OUT))
    for b in range(4):
        state = x[b].numpy()[mask[b].bool().numpy()].mean(0)
        z = m["M_1"] @ np.maximum(m["M_0"] @ state + m["c_0"], 0) + m["c_1"]
        w = z
        if cls is exapt.DLPLoRA:
            p, chosen, held = softmax(z), [], 0.0
            for k in np.argsort(-p):
                if held >= 0.6:
                    break
                chosen.append(k)
                held += p[k]
            w = np.array([p[k] / held if k in chosen else 0.0 for k in range(3)])
        h = x[b].numpy()
        for name, layer in layers.items():
            t = {k.rpartition(".")[2]: v.numpy() for k, v in model.named_buffers() if k.startswith(name)}
            h = h @ (layer["weight"] + 1.5 * sum(w[k] * t["B"][k] @ t["A"][k] for k in range(3))).T + layer["bias"]
        expected[b] = h
    np.testing.assert_allclose(model(x, attention_mask=mask).detach().numpy() if cls is exapt.DLPLoRA else np.stack(
        [model(x[b : b + 1, : int(mask[b].sum())]).detach().numpy()[0, 0] for b in range(4)]
    ), expected if cls is exapt.DLPLoRA else expected[:, 0], rtol=1e-8)  # fmt: skip


def test_dlp_lora_learns_from_the_tasks(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        one = exapt.attach(model_of("text"), exapt.LoRA(rank=2))
        perturb(one, 0.3, seed=i)
        paths.append(exapt.save(one, tmp_path / f"{i}"))
    model = from_adapters(model_of("text"), paths, exapt.DLPLoRA(supervised=True, width=8, top_p=0.5))
    ids, tasks = inputs_of("text", 8), torch.arange(8) % 2
    ids[:, 0] = 3 + tasks
    optimiser = torch.optim.Adam(exapt.trainable(model).values(), lr=0.03)
    for _ in range(60):
        optimiser.zero_grad()
        model(ids, task_ids=tasks)
        loss = penalty(model)
        assert loss is not None
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        y = model(ids, task_ids=tasks)
        each = [exapt.load(model_of("text"), p)(ids) for p in paths]
    torch.testing.assert_close(y, torch.stack([each[t][i] for i, t in enumerate(tasks)]), rtol=1e-3, atol=1e-3)


def test_smore() -> None:
    s, r, f, width = (3, 4), (2, 1), (2, 2), 3
    model, t = attached(exapt.SMoRE(experts=s, ranks=r, fanout=f, gate=width, down=2, balance=0.5))
    x = tokens()
    loads = [np.zeros(n) for n in s]
    shares = [np.zeros(n) for n in s]
    nodes = [0, 0]

    def gate(seen: Array, i: int) -> tuple[Array, Array]:
        inner = t[f"H_{i}"] @ np.maximum(t[f"G_{i}"] @ seen + t[f"g_{i}"], 0) + t[f"e_{i}"]
        p = softmax(t[f"K_{i}"] @ inner)
        best = np.argsort(-p)[: f[i]]
        loads[i][best] += 1
        shares[i] += p
        nodes[i] += 1
        return best, p[best] / p[best].sum()

    def node(v: Array, seen: Array, i: int) -> Array:
        """What a node of layer i + 1 sums over its children in layer i."""
        total: Any = 0.0
        for c, g in zip(*gate(seen, i), strict=True):
            inner = t[f"B_{i}"][c] @ (t[f"A_{i}"][c] @ v + t[f"a_{i}"][c]) + t[f"b_{i}"][c]
            if i:
                inner = inner + t[f"W_{i}"] @ node(v, np.concatenate([seen, t[f"K_{i}"][c]]), i - 1) + t[f"w_{i}"]
            total = total + g * np.tanh(inner)
        return total

    expected = base(t, x)
    for i in np.ndindex(expected.shape[:-1]):
        v = x[i].numpy()
        expected[i] += t["U"] @ node(v, t["P"] @ v + t["p"], 1) + t["u"]
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9)
    loss = penalty(model)
    assert loss is not None
    wanted = 0.5 * sum(n * (loads[i] / nodes[i] * shares[i] / nodes[i]).sum() for i, n in enumerate(s))
    np.testing.assert_allclose(loss.item(), wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: exapt.ScaLearn(experts=0), "at least 1"), (lambda: exapt.ScaLearn(exapt.LoRA()), "must add"), (lambda: exapt.MixDA(depth=0), "at least 1"),
        (lambda: exapt.MixDA(exapt.LoRA()), "must add"), (lambda: exapt.MTLLoRA(rank=2, temperature=0.0), "above 0"),
        (lambda: exapt.PETALface(rank=9), "takes 1"),
        (lambda: exapt.AlignLoRA(rank=2, gamma=0.0), "positive"), (lambda: exapt.DLPLoRA(rank=2, top_p=0.0), "above 0"),
        (lambda: exapt.PSEC(rank=2, width=0), "at least 1"), (lambda: exapt.SMoRE(fanout=(9, 9)), "fanout"), (lambda: exapt.SMoRE(ranks=(1,)), "each layer"),
    ],
)  # fmt: skip
def test_bad_fields(make: Any, match: str) -> None:
    with pytest.raises(exapt.InputError, match=match):
        exapt.attach(nn.Linear(D, OUT), make(), where="all")
