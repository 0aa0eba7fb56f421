"""AdaMerging and aTLAS: the gradients and steps written out in NumPy for a linear classifier, and digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learned_digits import DOMAINS, accuracy, digits, experts, network
from torch import nn

import exapt
from exapt.algebra.choose.ada import adamerging
from exapt.algebra.choose.anisotropic import atlas
from exapt.algebra.choose.rows import row_scores
from exapt.algebra.tensors import merge_tensors

RNG = np.random.default_rng(0)
BASE, TAU = RNG.normal(size=(4, 3)) * 0.5, RNG.normal(size=(2, 4, 3))
BIAS, TAU_BIAS = RNG.normal(size=4), RNG.normal(size=(2, 4))
X = [RNG.normal(size=(6, 3)) for _ in range(3)]
Y = RNG.integers(0, 4, 6)


def t(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float32)


def linear() -> tuple[nn.Module, dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    base = {"weight": t(BASE), "bias": t(BIAS)}
    return nn.Linear(3, 4), base, [{"weight": t(BASE + w), "bias": t(BIAS + b)} for w, b in zip(TAU, TAU_BIAS, strict=True)]


def logits(c: np.ndarray, x: np.ndarray) -> np.ndarray:
    """With coefficients (2 models, 2 tensors)."""
    return x @ (BASE + np.einsum("t,toi->oi", c[:, 0], TAU)).T + BIAS + c[:, 1] @ TAU_BIAS


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def chain(dz: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The gradient of the coefficients from that of the logits."""
    return np.stack([np.einsum("no,toi,ni->t", dz, TAU, x), np.einsum("no,to->t", dz, TAU_BIAS)], 1)


def entropy_step(c: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray]:
    p = softmax(logits(c, x))
    h = -(p * np.log(p)).sum(1, keepdims=True)
    return float(h.mean()), chain(-p * (np.log(p) + h) / len(x), x)


def adam(c: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, k: int, lr: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    return c - lr * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8), m, v


@pytest.mark.parametrize("by", ["layer", "task"])
def test_adamerging_step_by_step(by: str) -> None:
    """Two tasks (the second with two batches in turn), Adam at 0.3 from 0.3, coefficients clamped to [0, 1]."""
    c, m, v, losses = np.full((2, 2), 0.3), np.zeros((2, 2)), np.zeros((2, 2)), []
    for k in range(1, 9):
        used = c.clip(0, 1)
        found = [entropy_step(used, x) for x in (X[0], X[1 + (k - 1) % 2])]
        g = sum(f[1] for f in found)
        if by == "task":
            g = np.repeat(g.sum(1, keepdims=True), 2, 1)
        losses.append(sum(f[0] for f in found))
        c, m, v = adam(c, g * ((c >= 0) & (c <= 1)), m, v, k, 0.3)
    model, base, models = linear()
    learned = adamerging(model, base, models, [[t(X[0])], [t(X[1]), (t(X[2]),)]], by=by, lr=0.3, steps=8)  # type: ignore[arg-type]
    np.testing.assert_allclose(learned.losses.numpy(), losses, rtol=2e-4)
    expected = c.clip(0, 1)
    assert learned.groups == (("weight", "bias") if by == "layer" else ("all",))
    np.testing.assert_allclose(learned.coefficients[..., 0].numpy(), expected if by == "layer" else expected[:, :1], rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(learned.tensors["bias"].numpy(), BIAS + expected[:, 1] @ TAU_BIAS, rtol=2e-3, atol=2e-3)
    assert (c < 0).any() or (c > 1).any(), "the clamp has been at work"


def test_adamerging_plus_plus_elects_signs_over_the_model() -> None:
    flat = np.concatenate([TAU.reshape(2, -1), TAU_BIAS], 1)
    kept = np.stack([np.where(np.abs(f) >= np.sort(np.abs(f))[-8], f, 0) for f in flat])  # 8 of 16 entries
    sign = np.sign(kept.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    kept = np.where(np.sign(kept) == sign, kept, 0)
    model, base, models = linear()
    learned = adamerging(model, base, models, [[t(X[0])]], density=0.5, start=0.5, steps=0)
    np.testing.assert_allclose(learned.tensors["weight"].numpy(), BASE + 0.5 * kept[:, :12].sum(0).reshape(4, 3), atol=1e-6)
    np.testing.assert_allclose(learned.tensors["bias"].numpy(), BIAS + 0.5 * kept[:, 12:].sum(0), atol=1e-6)


@pytest.mark.parametrize("objective", ["supervised", "entropy"])
def test_atlas_step_by_step(objective: str) -> None:
    """AdamW from zero with weight decay, the gradient clipped at norm 0.5, the rate along a cosine."""
    c, m, v, losses = np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2)), []
    for k in range(1, 7):
        lr = 0.1 * 0.5 * (1 + np.cos(np.pi * (k - 1) / 6))
        if objective == "entropy":
            value, g = entropy_step(c, X[0])
        else:
            p = softmax(logits(c, X[0]))
            value, g = float(-np.log(p[np.arange(6), Y]).mean()), chain((p - np.eye(4)[Y]) / 6, X[0])
        losses.append(value)
        g = g * min(1, 0.5 / (np.linalg.norm(g) + 1e-6))
        c, m, v = adam(c * (1 - lr * 0.2), g, m, v, k, lr)
    model, base, models = linear()
    batch: Any = (t(X[0]), torch.tensor(Y)) if objective == "supervised" else t(X[0])
    learned = atlas(model, base, models, [batch], objective=objective, steps=6, weight_decay=0.2, clip=0.5)  # type: ignore[arg-type]
    np.testing.assert_allclose(learned.losses.numpy(), losses, rtol=1e-4)
    np.testing.assert_allclose(learned.coefficients[..., 0].numpy(), c, rtol=1e-3, atol=1e-5)
    own = atlas(model, base, models, [(t(X[0]), None)], objective=lambda z, _: z.square().mean(), steps=2)
    assert own.losses[1] < own.losses[0]


def test_atlas_divides_a_tensor_into_blocks() -> None:
    model, base, models = linear()
    learned = atlas(model, base, models, [(t(X[0]), torch.tensor(Y))], partition=3, steps=4)
    assert learned.coefficients.shape == (2, 2, 3)
    per_entry = (learned.tensors["bias"].numpy() - BIAS)[None] / TAU_BIAS
    assert learned.tensors["weight"].shape == (4, 3)
    # every entry moves by a sum over the models of one of three coefficients
    c = learned.coefficients[:, 1].numpy()
    sums = np.stack([c[:, k] @ TAU_BIAS for k in range(3)])
    moved = learned.tensors["bias"].numpy() - BIAS
    assert per_entry.shape == (2, 4)
    np.testing.assert_allclose(np.abs(sums - moved).min(0), 0, atol=1e-5)
    again = atlas(model, base, models, [(t(X[0]), torch.tensor(Y))], partition=3, steps=4)
    assert torch.equal(again.tensors["weight"], learned.tensors["weight"])


def test_zero_coefficients_are_the_base_bit_for_bit_and_the_model_stays() -> None:
    base = {"weight": t(BASE), "bias": t(BIAS), "count": torch.tensor(3)}
    model = nn.Linear(3, 4).train()
    before = {k: p.clone() for k, p in model.state_dict().items()}
    model.register_buffer("count", torch.tensor(3))
    models = [{**base, "weight": base["weight"] + 1}]
    found = adamerging(model, base, models, [[t(X[0])]], start=0.0, steps=0)
    assert all(torch.equal(found.tensors[k], base[k]) for k in base)
    atlas(model, base, models, [(t(X[0]), torch.tensor(Y))], steps=3)
    part = atlas(model, {"bias": base["bias"]}, [{"bias": base["bias"] + 1.0 * torch.arange(4)}], [(t(X[0]), torch.tensor(Y))], steps=3)
    assert list(part.tensors) == ["bias"]
    assert model.training
    assert all(torch.equal(p, before[k]) for k, p in model.state_dict().items() if k in before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("by", ["layer", "task"])
def test_adamerging_finds_the_expert_of_unlabelled_rows(by: Any) -> None:
    base, models = experts()
    start = merge_tensors("task_arithmetic", models, base, scale=0.3)
    for i, domain in enumerate(DOMAINS):
        rows = digits()[domain][2]  # the test rows, without their labels, as in the paper
        found = adamerging(network(), base, models, [[rows[k : k + 100] for k in range(0, 700, 100)]], by=by, steps=60, lr=1e-2)
        assert found.losses[-7:].mean() < found.losses[:7].mean()
        assert int(found.coefficients.mean((1, 2)).argmax()) == i
        assert accuracy(found.tensors, domain) > accuracy(start, domain) + 0.03
        assert found.coefficients.shape == (3, 6 if by == "layer" else 1, 1)


def test_adamerging_leaves_out_a_model_of_noise() -> None:
    base, models = experts()
    noise = {k: t + 2 * (models[0][k] - t).std() * torch.randn_like(t) for k, t in base.items()}
    batches = [[digits()[d][2][k : k + 100] for k in range(0, 700, 100)] for d in DOMAINS]
    found = adamerging(network(), base, [*models, noise], batches, by="task", steps=60, lr=1e-2)
    assert found.coefficients[3].item() < 0.01


def test_atlas_learns_a_new_domain_from_few_labels() -> None:
    """Transposed digits from 60 labels: no expert knows them; composed block by block they get much further than any one."""
    base, models = experts()
    x, y, xt, yt = digits()["upright"]
    turned, test = (z.reshape(-1, 8, 8).mT.reshape(-1, 64) for z in (x, xt))
    score = row_scores(network(), test, yt)
    found = atlas(network(), base, models, [(turned[:60], y[:60])], steps=60, partition=50)
    alone = max(float(score(m).mean()) for m in (base, *models))
    assert float(score(found.tensors).mean()) > alone + 0.15


def test_atlas_keeps_the_best_coefficients_it_has_seen() -> None:
    model, base, models = linear()
    batch, seen = (t(X[0]), torch.tensor(Y)), []

    def near(tensors: dict[str, torch.Tensor]) -> float:
        seen.append(float((tensors["bias"] - base["bias"]).norm()))
        return -abs(seen[-1] - 0.2)

    kept = atlas(model, base, models, [batch], steps=10, every=2, evaluate=near)
    assert len(seen) == 6
    best = min(seen, key=lambda x: abs(x - 0.2))
    assert float((kept.tensors["bias"] - base["bias"]).norm()) == pytest.approx(best, rel=1e-5)
    worse = atlas(model, base, models, [batch], steps=10, evaluate=lambda tensors: -(tensors["bias"] - base["bias"]).norm())
    assert torch.equal(worse.tensors["weight"], base["weight"])
    assert not worse.coefficients.any()


def test_bad_input() -> None:
    model, base, models = linear()
    with pytest.raises(exapt.InputError, match="adamerging: 2 tasks, of which 1 have no batch"):
        adamerging(model, base, models, [[t(X[0])], []])
    with pytest.raises(exapt.InputError, match="adamerging: the density is 0"):
        adamerging(model, base, models, [[t(X[0])]], density=0.0)
    with pytest.raises(exapt.InputError, match="adamerging: model 0 lacks bias"):
        adamerging(model, base, [{"weight": t(BASE)}], [[t(X[0])]])
    with pytest.raises(exapt.InputError, match="bias: model 1 holds NaN"):
        atlas(model, base, [models[0], {**models[1], "bias": torch.full((4,), torch.nan)}], [(t(X[0]), torch.tensor(Y))])
    with pytest.raises(exapt.InputError, match="there is no batch"):
        atlas(model, base, models, [])
    with pytest.raises(exapt.InputError, match="no pair of inputs and labels"):
        atlas(model, base, models, [t(X[0])])
    with pytest.raises(exapt.InputError, match='no objective "labels"'):
        atlas(model, base, models, [t(X[0])], objective="labels")  # type: ignore[arg-type]
    with pytest.raises(exapt.InputError, match="into 0 blocks"):
        atlas(model, base, models, [(t(X[0]), torch.tensor(Y))], partition=0)
    with pytest.raises(exapt.InputError, match="there is no model to merge"):
        atlas(model, base, [], [(t(X[0]), torch.tensor(Y))])
