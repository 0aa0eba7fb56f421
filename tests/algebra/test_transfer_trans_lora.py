"""Trans-LoRA: the filter against SciPy, the set against its draws, and a LoRA moved between networks of digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learned_digits import digits
from scipy.optimize import minimize
from torch import Tensor, nn

import exapt
from exapt.algebra.transfer.trans_lora import trained_filter, transfer_set


def test_filter_against_scipy() -> None:
    """The likelihood of equation 1, each kind's mean, with scikit-learn's unit ridge, minimised anew."""
    r = np.random.default_rng(0)
    real, fake = r.normal(0.0, 1.0, (60, 3)), r.normal(0.7, 1.0, (150, 3))
    found = trained_filter(torch.tensor(real), torch.tensor(fake))
    x = np.r_[real, fake]
    x = np.c_[(x - x.mean(0)) / x.std(0), np.ones(len(x))]
    sign, weight = np.r_[np.ones(60), -np.ones(150)], np.r_[np.full(60, 210 / 120), np.full(150, 210 / 300)]
    best = minimize(lambda w: (weight * np.log1p(np.exp(-sign * (x @ w)))).sum() + (w[:3] ** 2).sum() / 2, np.zeros(4)).x
    score = x @ best
    clear = np.abs(score) > 1e-3
    got = found(torch.tensor(np.r_[real, fake])).numpy()
    np.testing.assert_array_equal(got[clear], (score > 0)[clear])
    assert got[:60].mean() > got[60:].mean()


def test_filter_reads_features_and_takes_any_classifier() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    texts, fakes = ["a cat", "a dog", "a cow"], ["zzzzzzzz", "yyyyyyyyy", "xxxxxxxxxx"]
    encode = lambda rows: torch.tensor([[float(len(t))] for t in rows])  # noqa: E731
    found = trained_filter(texts, fakes, encode=encode, classifier=KNeighborsClassifier(1))
    assert found(["a pig", "wwwwwwwwww"]).tolist() == [True, False]


def test_set_holds_the_accepted_rows_of_the_draws() -> None:
    drawn: list[Tensor] = []

    def synthesise(seeds: Tensor, n: int, g: torch.Generator) -> Tensor:
        drawn.append(seeds[torch.randint(len(seeds), (n,), generator=g)] + torch.randn(n, 2, generator=g))
        return drawn[-1]

    found = transfer_set(torch.zeros(5, 2), synthesise, lambda x: x.sum(1), lambda x: x[:, 0] > 0.5, 20, batch=16)
    every = torch.cat(drawn).numpy()
    expected = every[every[:, 0] > 0.5][:20]
    np.testing.assert_array_equal(found.inputs, expected)
    np.testing.assert_allclose(found.answers, expected.sum(1), rtol=1e-6)
    assert found.drawn == len(every) == 16 * len(drawn)
    assert found.accepted == 20 / len(every)
    again = transfer_set(torch.zeros(5, 2), synthesise, lambda x: x.sum(1), lambda x: x[:, 0] > 0.5, 20, batch=16)
    assert torch.equal(torch.as_tensor(again.inputs), torch.as_tensor(found.inputs)), "the same seed draws the same"


def test_texts() -> None:
    def synthesise(seeds: list[str], n: int, g: torch.Generator) -> list[str]:
        return [seeds[int(i)] + "!" * int(k) for i, k in zip(torch.randint(2, (n,), generator=g), torch.randint(4, (n,), generator=g), strict=True)]

    found = transfer_set(
        ["yes", "no"], synthesise, lambda x: torch.tensor([t.startswith("yes") for t in x]), lambda x: torch.tensor(["!!" not in t for t in x]), 9
    )
    assert isinstance(found.inputs, list)
    assert set(found.inputs) <= {"yes", "no", "yes!", "no!"}
    assert found.answers.tolist() == [t.startswith("yes") for t in found.inputs]


def test_bad_input() -> None:
    x, g = torch.zeros(3, 2), lambda s, n, g: torch.zeros(n, 2)
    with pytest.raises(exapt.InputError, match="0 real and 3 synthetic"):
        trained_filter(x[:0], x)
    with pytest.raises(exapt.InputError, match="not finite"):
        trained_filter(x, x / 0)
    with pytest.raises(exapt.InputError, match="0 seeds"):
        transfer_set(x[:0], g, lambda x: x, lambda x: x[:, 0] == 0, 3)
    with pytest.raises(exapt.InputError, match="one boolean for each"):
        transfer_set(x, g, lambda x: x, lambda x: x[:, 0], 3)
    with pytest.raises(exapt.InputError, match="0 of 40 synthesised inputs pass the filter, 3 are asked for"):
        transfer_set(x, g, lambda x: x, lambda x: x[:, 0] > 0, 3, most=40)
    with pytest.raises(exapt.InputError, match=r"answers 3 inputs with shape \(1, 2\)"):
        transfer_set(x, g, lambda x: x[:1], lambda x: x[:, 0] == 0, 3)


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def descend(model: nn.Module, tensors: dict[str, Tensor], x: Tensor, target: Tensor, steps: int, lr: float) -> nn.Module:
    """Gradient descent with momentum on cross-entropy with labels or probabilities."""
    g, speed = torch.Generator().manual_seed(0), {k: torch.zeros_like(t) for k, t in tensors.items()}
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=g)
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x[rows]), target[rows]), list(tensors.values()))
        with torch.no_grad():
            for (k, t), d in zip(tensors.items(), grads, strict=True):
                speed[k].mul_(0.9).add_(d)
                t.sub_(lr * speed[k])
    return model


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def test_a_lora_of_digits_moves_to_a_wider_network() -> None:
    upright, turned = digits()["upright"], digits()["quarter turn"]
    x, y, held, labels = turned
    bases = [descend(m, dict(m.named_parameters()), upright[0], upright[1], 150, 0.05) for m in (network(32, 0), network(72, 1))]
    source, target = (exapt.attach(b, exapt.LoRA(rank=6, alpha=6.0), where="all") for b in bases)
    before = right(target, held, labels)
    descend(source, exapt.trainable(source), x, y, 400, 0.03)
    seeds = torch.cat([x[y == k][:10] for k in range(10)])  # a few of each digit, and no labels of theirs

    def synthesise(seeds: Tensor, n: int, g: torch.Generator) -> Tensor:
        a, b = (seeds[torch.randint(len(seeds), (n,), generator=g)] for _ in range(2))
        share, noise = 0.5 * torch.rand(n, 1, generator=g), 0.4 * torch.rand(n, 1, generator=g)
        return (a + share * (b - a) + noise * torch.randn(a.shape, generator=g)).clamp(0, 1)

    fakes = synthesise(seeds, 1000, torch.Generator().manual_seed(1))
    encode = lambda rows: torch.cat([rows, rows**2], 1)  # noqa: E731
    accept = trained_filter(x, fakes, encode=encode)
    found = transfer_set(seeds, synthesise, lambda rows: source(rows).softmax(1), accept, 1000)
    assert 0.02 < found.accepted < 0.9, "the filter refuses some"
    descend(target, exapt.trainable(target), torch.as_tensor(found.inputs), found.answers, 600, 0.03)
    moved, taught = right(target, held, labels), right(source, held, labels)
    assert taught > 0.85
    assert moved > taught - 0.05
    assert before < 0.5
