"""PHA against its formulas in NumPy, and its retriever on tasks that it has to tell apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor, nn

import exapt
from exapt.methods.pha import PHA, nearest_prototype

D = 6


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def drawn(model: nn.Module) -> dict[str, dict[str, np.ndarray]]:
    p: dict[str, dict[str, np.ndarray]] = {"shared": {}, "first": {}, "second": {}}
    with torch.no_grad():
        for name, t in exapt.trainable(model).items():
            t.copy_(0.5 * torch.randn_like(t))
            p[name.split(".")[0] if name[0] in "fs" else "shared"][name.rpartition(".")[2]] = t.numpy().astype(float)
    return p


def test_against_its_formulas() -> None:
    model = exapt.attach(Model().double(), PHA(n_tasks=3, bottleneck=2, size=4, hidden=5, weight=0.3, temperature=0.2), where=("first", "second"))
    p = drawn(model)
    s = p["shared"]
    assert not p["second"]
    assert set(p["first"]) == {"R_1", "R_2", "r_1", "r_2"}
    x, ids = torch.randn(5, 3, D, dtype=torch.double), torch.tensor([2, 0, 2, 0, 1])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    expected = x.numpy()
    for place, name in enumerate(("first", "second")):
        lin, out = getattr(model, name), []
        for row, task in zip(expected, ids.tolist(), strict=True):
            e = s["L_2"] @ np.maximum(s["L_1"] @ np.concatenate([s["k"][task], s["l"][place]]) + s["c_1"], 0) + s["c_2"]
            e = (e - e.mean()) / np.sqrt(e.var() + 1e-6) * s["n"] + s["m"]
            down, b_down, up, b_up = (s[k] @ e + s[f"c_{k}"] for k in ("D", "b_D", "U", "b_U"))
            inner = np.maximum(row @ down.reshape(2, D).T + b_down, 0)
            out.append(row @ lin.weight.detach().numpy().T + lin.bias.detach().numpy() + inner @ up.reshape(D, 2).T + b_up)
        expected = np.stack(out) if name == "second" else np.tanh(np.stack(out))
    y = model(x, task_ids=ids, attention_mask=mask)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-4, atol=1e-5)

    seen = x.numpy() * mask.numpy()[..., None]
    mean = seen.sum(1) / mask.numpy().sum(1)[:, None]
    z = np.maximum(mean @ p["first"]["R_1"].T + p["first"]["r_1"], 0) @ p["first"]["R_2"].T + p["first"]["r_2"]
    np.testing.assert_allclose(exapt.noted(model)["first"]["instances"].numpy(), z, rtol=1e-4, atol=1e-5)
    z, k, t = z / np.linalg.norm(z, axis=1, keepdims=True), s["k"] / np.linalg.norm(s["k"], axis=1, keepdims=True), ids.numpy()
    ins = []
    for i in range(5):
        others = [n for n in range(5) if n != i]
        whole = logsumexp([z[i] @ z[n] / 0.2 for n in others])
        positives = [n for n in others if t[n] == t[i]]
        if positives:
            ins.append(-np.mean([z[i] @ z[n] / 0.2 - whole for n in positives]))
    pro = [logsumexp([z[i] @ k[n] / 0.2 for n in range(3) if n != t[i]]) - z[i] @ k[t[i]] / 0.2 for i in range(5)]
    np.testing.assert_allclose(float(exapt.penalty(model).detach()), 0.3 * (np.mean(ins) + np.mean(pro)), rtol=1e-4)


def test_the_retriever_finds_the_task_of_unseen_rows() -> None:
    centres = torch.randn(3, D) * 1.5
    model = exapt.attach(Model(), PHA(n_tasks=3, bottleneck=4, size=8, hidden=16, weight=1.0), where=("first", "second"), seed=0)
    optimiser = torch.optim.Adam(exapt.trainable(model).values(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(3, (24,))
        model(centres[ids][:, None] + 0.5 * torch.randn(24, 4, D), task_ids=ids)
        loss = exapt.penalty(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    prototypes = next(t for n, t in exapt.trainable(model).items() if n.endswith(".k")).detach()
    for task in range(3):
        model(centres[task] + 0.5 * torch.randn(10, 4, D), task_ids=torch.zeros(10, dtype=torch.long))  # the given task does not tell it
        assert nearest_prototype(exapt.noted(model)["first"]["instances"], prototypes) == task


def test_what_it_refuses() -> None:
    with pytest.raises(exapt.InputError, match="as many in the output"):
        exapt.attach(nn.Sequential(nn.Linear(4, 5)), PHA(), where="0")
    model = exapt.attach(Model(), PHA(n_tasks=2), where=("first", "second"))
    with pytest.raises(exapt.InputError, match="reads task_ids"):
        model(torch.zeros(2, 3, D))
    with pytest.raises(exapt.InputError, match="one id per row"):
        model(torch.zeros(2, 3, D), task_ids=torch.tensor([[0], [1]]))


class Translator(nn.Module):
    """An encoder of one width and a decoder of another."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm, self.bridge = nn.Linear(D, 5), nn.LayerNorm(5), nn.Linear(5, D)
        self.decoder = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.bridge(self.norm(torch.tanh(self.encoder(x)))).mean(1, keepdim=True).expand(-1, 2, -1)
        return self.decoder[1](torch.tanh(self.decoder[0](h)))


def test_the_retriever_reads_the_encoders_output_and_leaves_it_as_it_is() -> None:
    where = ("norm", "decoder.0", "decoder.1")
    model = exapt.attach(Translator().double(), PHA(n_tasks=3, bottleneck=2, size=4, hidden=7, weight=0.3, retriever="norm"), where=where)
    p = {n: t.detach().numpy() for n, t in exapt.trainable(model).items()}
    own = {n.rpartition(".")[2]: t for n, t in p.items() if n.startswith("norm.")}
    assert {k: t.shape for k, t in own.items()} == {"R_1": (7, 5), "R_2": (4, 7), "r_1": (7,), "r_2": (4,)}
    assert not any(n.startswith("decoder") and n.rpartition(".")[2].startswith("R") for n in p)
    assert next(t for n, t in p.items() if n.endswith(".l")).shape == (2, 4)
    x, ids = torch.randn(4, 3, D, dtype=torch.double), torch.tensor([2, 0, 2, 1])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    seen: list[Tensor] = []
    hook = model.bridge.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, task_ids=ids, attention_mask=mask)
    hook.remove()
    with exapt.disabled(model):
        plain = model.norm(torch.tanh(model.encoder(x)))
    torch.testing.assert_close(seen[0], plain)
    h = plain.detach().numpy() * mask.numpy()[..., None]
    mean = h.sum(1) / mask.numpy().sum(1)[:, None]
    z = np.maximum(mean @ own["R_1"].T + own["r_1"], 0) @ own["R_2"].T + own["r_2"]
    np.testing.assert_allclose(exapt.noted(model)["norm"]["instances"].detach().numpy(), z, rtol=1e-6)
    exapt.penalty(model).backward()
    assert all(t.grad is not None for n, t in exapt.trainable(model).items() if n.rpartition(".")[2] in ("k", "R_1", "R_2"))


def test_it_refuses_a_retriever_that_is_no_one_site() -> None:
    with pytest.raises(exapt.InputError, match="names 0 of 2 sites"):
        exapt.attach(Translator(), PHA(n_tasks=2, retriever="nor?"), where=("decoder.0", "decoder.1"))
    with pytest.raises(exapt.InputError, match="one task has nothing to retrieve"):
        exapt.attach(Translator(), PHA(retriever="norm"), where=("norm", "decoder.0"))
