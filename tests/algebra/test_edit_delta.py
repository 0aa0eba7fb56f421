"""Delta-parameter editing, and GRACE's and WISE's adapters by themselves, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import exapt
from exapt.algebra.delta_editing import edited_delta, predicted_change
from exapt.algebra.edit.grace_codebook import place
from exapt.core.file import holders


def test_edited_deltas_against_numpy() -> None:
    d = {"w": torch.randn(12, 10), "b": torch.randn(12)}
    w = d["w"].numpy()
    pruned = edited_delta(d, "prune", drop=0.4)["w"].numpy()
    kept = pruned != 0
    np.testing.assert_allclose(pruned[kept], w[kept] / 0.6, rtol=1e-6)
    assert 0.4 < kept.mean() < 0.8
    np.testing.assert_allclose(edited_delta(d, "prune", drop=0.4, factor=0.25)["w"].numpy(), 0.25 * np.where(kept, w, 0), rtol=1e-6)
    assert torch.equal(edited_delta(d, "prune", drop=0.4)["w"], edited_delta(d, "prune", drop=0.4)["w"])
    assert all(torch.equal(v, d[k]) for k, v in edited_delta(d, "prune", drop=0.0).items())
    np.testing.assert_allclose(edited_delta(d, "quantise")["w"].numpy(), np.sign(w) * np.abs(w).mean(), rtol=1e-5)  # BitDelta
    order = np.argsort(np.abs(w).ravel())
    expected = np.zeros(w.size)
    for part in np.array_split(order, 3):
        expected[part] = np.sign(w.ravel()[part]) * np.abs(w.ravel()[part]).mean()
    np.testing.assert_allclose(edited_delta(d, "quantise", levels=3)["w"].numpy().ravel(), expected, rtol=1e-5)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(edited_delta(d, "low_rank", rank=2)["w"].numpy(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    assert torch.equal(edited_delta(d, "low_rank", rank=2)["b"], d["b"])
    assert torch.equal(edited_delta(d, "extrapolate", scale=2.0)["b"], 2 * d["b"])


def test_finer_quantisation_and_higher_rank_lose_less() -> None:
    d = {"w": torch.randn(16, 16)}
    for how, name in (("quantise", "levels"), ("low_rank", "rank")):
        lost = [float((edited_delta(d, how, **{name: n})["w"] - d["w"]).norm()) for n in (1, 2, 4, 8)]  # type: ignore[arg-type]
        assert lost == sorted(lost, reverse=True)
        assert lost[-1] < lost[0]


def test_the_riemann_sum_predicts_the_loss() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    weights = {"a": torch.randn(8, 6), "b": torch.randn(3, 8)}

    def loss(w: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(F.linear(F.linear(x, w["a"]).tanh(), w["b"]), y)

    delta = {"a": 0.3 * torch.randn(8, 6), "b": 0.3 * torch.randn(3, 8)}
    change = {k: v - delta[k] for k, v in edited_delta(delta, "prune").items()}
    true = float(loss({k: weights[k] + change[k] for k in weights}) - loss(weights))
    errors = [abs(predicted_change(loss, weights, change, terms=c) - true) for c in (1, 10, 100, 400)]
    assert errors[3] < 0.02 * abs(true)
    assert errors[1] > errors[2] > errors[3]
    traced = {k: v.clone().requires_grad_() for k, v in weights.items()}
    slopes = torch.autograd.grad(loss(traced), list(traced.values()))
    first = sum(float((change[k] * g).sum()) for k, g in zip(weights, slopes, strict=True))
    assert predicted_change(loss, weights, change, terms=1) == pytest.approx(first, rel=1e-5)
    part = predicted_change(loss, weights, {"a": change["a"]}, terms=400)
    assert part == pytest.approx(float(loss({**weights, "a": weights["a"] + change["a"]}) - loss(weights)), abs=2e-3)


def test_bad_deltas() -> None:
    d = {"w": torch.ones(2, 2)}
    with pytest.raises(exapt.InputError, match=r"drop 1.0 lies in \[0, 1\)"):
        edited_delta(d, "prune", drop=1.0)
    with pytest.raises(exapt.InputError, match='how is "cut"'):
        edited_delta(d, "cut")  # type: ignore[arg-type]
    with pytest.raises(exapt.InputError, match="w: a delta must hold finite"):
        edited_delta({"w": torch.tensor([torch.nan])}, "quantise")
    with pytest.raises(exapt.InputError, match="v is changed"):
        predicted_change(lambda w: w["w"].sum(), d, {"v": torch.ones(2, 2)})
    with pytest.raises(exapt.InputError, match="nothing is changed"):
        predicted_change(lambda w: w["w"].sum(), d, {})
    with pytest.raises(exapt.InputError, match="not finite at 0/2"):
        predicted_change(lambda w: w["w"].sum() / 0, d, d, terms=2)


def held(model: nn.Module) -> dict[str, Tensor]:
    ((_, holder),) = holders(model, "default")
    return holder.tensors()


def test_grace_replaces_in_its_balls_only() -> None:
    layer = nn.Linear(3, 2)
    model = exapt.attach(nn.Sequential(layer), exapt.GRACE(entries=4), where="0")
    x = torch.randn(5, 7, 3)
    bare = layer(x).detach()
    p = held(model)
    with torch.no_grad():
        p["k"][:2], p["v"][:2], p["eps"][:2] = x[0, :2], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.8, 1.5])
    expected = bare.numpy().copy()
    k, v, eps = (p[n][:2].detach().numpy() for n in ("k", "v", "eps"))
    for i, j in np.ndindex(5, 7):
        d = np.linalg.norm(x[i, j].numpy() - k, axis=1)
        if d.min() <= eps[d.argmin()]:
            expected[i, j] = v[d.argmin()]
    assert 2 <= (expected != bare.numpy()).any(-1).sum() < 35
    np.testing.assert_array_equal(model(x).detach().numpy(), expected)
    exapt.detach(model)
    one = exapt.attach(nn.Sequential(layer), exapt.GRACE(entries=1, places="first"), where="0")
    p = held(one)
    with torch.no_grad():
        p["eps"].fill_(1e6)
    out = one(x)
    assert bool((out[:, 0] == 0).all())
    assert torch.equal(out[:, 1:], bare[:, 1:])


def test_a_codebook_grows_and_splits() -> None:
    keys, eps, labels = torch.zeros(4, 2), torch.full((4,), -1.0), torch.zeros(4, dtype=torch.int64)
    at = torch.tensor([[0.0, 0.0], [1.5, 0.0], [1.0, 0.0], [9.0, 0.0]])
    assert place(keys, eps, labels, at[0], 0, 1.0) == -1
    assert place(keys, eps, labels, at[1], 0, 1.0) == 0  # within 1 + 1, the same answer: the ball grows
    assert eps.tolist() == [1.5, -1, -1, -1]
    assert place(keys, eps, labels, at[2], 1, 1.0) == -1  # another answer: both balls are halved
    assert eps[:2].tolist() == pytest.approx([0.5, 0.5], abs=2e-5)
    assert place(keys, eps, labels, at[3], 1, 1.0) == -1  # far from all
    assert eps[2] == 1.0
    assert labels.tolist() == [0, 1, 1, 0]


def test_side_memory_is_taken_where_it_reacts() -> None:
    layer = nn.Linear(3, 2)
    model = exapt.attach(nn.Sequential(layer), exapt.SideMemory(memories=2), where="0")
    x = torch.randn(30, 4, 3)
    bare = layer(x).detach().numpy()
    p = held(model)
    with torch.no_grad():
        p["D"].normal_()
        p["eps"].copy_(torch.tensor([1.8, 2.2]))
    expected, taken = bare.copy(), []
    for i in range(30):
        change = [x[i].numpy() @ d.T for d in p["D"].detach().numpy()]
        a = [np.linalg.norm(c, axis=1).mean() for c in change]
        able = [m for m in range(2) if a[m] >= p["eps"].numpy()[m]]
        taken.append(max(able, key=lambda m: a[m]) if able else -1)
        if able:
            expected[i] += change[taken[-1]]
    assert set(taken) == {-1, 0, 1}
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_bad_adapters() -> None:
    with pytest.raises(exapt.InputError, match=r"grace.entries is 0"):
        exapt.attach(nn.Sequential(nn.Linear(2, 2)), exapt.GRACE(entries=0), where="0")
    with pytest.raises(exapt.InputError, match=r"side_memory.memories is 0"):
        exapt.attach(nn.Sequential(nn.Linear(2, 2)), exapt.SideMemory(memories=0), where="0")
