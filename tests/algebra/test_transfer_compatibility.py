"""Flips of predictions against NumPy and exact enumeration, and fewer of them on digits by MUSCLE's loss."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from learned_digits import digits
from scipy.stats import beta
from torch import Tensor, nn

import exapt
from exapt.algebra.transfer.flips import flip_reduction, score_compatibility, update_compatibility
from exapt.objectives.muscle import compatible_distillation


def drawn(seed: int, n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    r = np.random.default_rng(seed)
    y = r.integers(0, 4, n)
    old, new = (np.where(r.random(n) < 0.7, y, r.integers(0, 4, n)) for _ in range(2))
    return torch.tensor(old), torch.tensor(new), torch.tensor(y)


def test_shares_against_numpy() -> None:
    old, new, y = drawn(0)
    a, b, t = old.numpy(), new.numpy(), y.numpy()
    found = update_compatibility(torch.nn.functional.one_hot(old).float(), new, y)
    assert found.negative.value == pytest.approx(np.mean((a == t) & (b != t)))
    assert found.positive.value == pytest.approx(np.mean((a != t) & (b == t)))
    assert found.inconsistent.value == pytest.approx(np.mean((b != t) & (a != b)))
    assert found.changed.value == pytest.approx(np.mean(a != b))
    assert found.gain.value == pytest.approx(np.mean(b == t) - np.mean(a == t))
    for m in (found.negative, found.positive, found.inconsistent, found.changed, found.gain):
        assert m.low < m.value < m.high
    n = len(t)
    half = 1.96 * np.sqrt(found.negative.value * (1 - found.negative.value) / n)
    assert found.negative.high - found.negative.low == pytest.approx(2 * half, rel=0.1)
    d = (b == t).astype(float) - (a == t)
    assert found.gain.high - found.gain.low == pytest.approx(2 * 1.96 * d.std() / np.sqrt(n), rel=0.1)


def test_intervals_against_all_samples() -> None:
    old, new, y = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 0, 1])
    flips = ((old == y) & (new != y)).numpy().astype(float)
    means = [flips[list(rows)].mean() for rows in itertools.product(range(4), repeat=4)]  # all 256 samples
    found = update_compatibility(old, new, y, draws=20_000)
    np.testing.assert_allclose([found.negative.low, found.negative.high], np.quantile(means, [0.025, 0.975]), atol=1e-9)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_no_flip_seen_is_not_no_flip_possible(level: float) -> None:
    y = torch.zeros(50, dtype=torch.long)
    same, all_wrong = update_compatibility(y, y, y, level=level), update_compatibility(y, y + 1, y, level=level)
    limit = beta.ppf((1 + level) / 2, 1, 50)  # Clopper-Pearson for 0 of 50
    assert (same.negative.value, same.negative.low) == (0.0, 0.0)
    assert same.negative.high == pytest.approx(limit)
    assert (all_wrong.negative.value, all_wrong.negative.high) == (1.0, 1.0)
    assert all_wrong.negative.low == pytest.approx(1 - limit)


def test_pairing_narrows_the_difference() -> None:
    """Two updates that flip the same rows differ by little, however many rows flip."""
    old, new, y = drawn(1, 1000)
    plain = update_compatibility(old, new, y)
    better = new.clone()
    better[torch.nonzero(plain.flips)[:10, 0]] = y[torch.nonzero(plain.flips)[:10, 0]]
    found = flip_reduction(plain, update_compatibility(old, better, y))
    assert found.value == pytest.approx(-0.01)
    assert found.high < 0, "told apart on the same rows"
    assert plain.negative.high - plain.negative.low > 2 * (found.high - found.low)


def test_scores_against_numpy() -> None:
    r = np.random.default_rng(2)
    a, b = r.random(300), r.random(300)
    b[:40] = a[:40]
    d = b - a
    found = score_compatibility(torch.tensor(a), torch.tensor(b))
    assert found.worse.value == pytest.approx((d < 0).mean())
    assert found.better.value == pytest.approx((d > 0).mean())
    assert found.regression == pytest.approx((np.abs(d) * (d < 0)).sum() / (d < 0).sum())
    assert found.improvement == pytest.approx((d * (d > 0)).sum() / (d > 0).sum())
    assert found.change.value == pytest.approx(d.mean())
    assert found.change.low < found.change.value < found.change.high
    same = score_compatibility(torch.tensor(a), torch.tensor(a))
    assert (same.regression, same.improvement, same.worse.value) == (0.0, 0.0, 0.0)


def test_bad_input() -> None:
    y = torch.tensor([0, 1])
    with pytest.raises(exapt.InputError, match=r"\(2,\) old and \(3,\) new"):
        update_compatibility(y, torch.tensor([0, 1, 1]), y)
    with pytest.raises(exapt.InputError, match="give one for each"):
        update_compatibility(y[:0], y[:0], y[:0])
    with pytest.raises(exapt.InputError, match="0 draws"):
        update_compatibility(y, y, y, draws=0)
    with pytest.raises(exapt.InputError, match="one finite number"):
        score_compatibility(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 1.0]))
    with pytest.raises(exapt.InputError, match="2 and 1 rows"):
        flip_reduction(update_compatibility(y, y, y), update_compatibility(y[:1], y[:1], y[:1]))


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def descended(start: dict[str, Tensor], loss: object, steps: int, lr: float, n: int) -> dict[str, Tensor]:
    now, g = dict(start), torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(n, (16,), generator=g)
        free = {k: t.detach().requires_grad_() for k, t in now.items()}
        grads = torch.autograd.grad(loss(free, rows), list(free.values()))  # type: ignore[operator]
        now = {k: t - lr * d for (k, t), d in zip(free.items(), grads, strict=True)}
    return {k: t.detach() for k, t in now.items()}


def test_flips_fall_on_digits() -> None:
    """An old narrow model, an update that is wider and better, and the update trained on for compatibility."""
    x, y, held, labels = digits()["upright"]

    def call(width: int, t: dict[str, Tensor], rows: Tensor) -> Tensor:
        return torch.func.functional_call(network(width), t, (rows,))

    def start(width: int, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return dict(network(width).state_dict())

    def cross(width: int) -> object:
        return lambda t, rows: nn.functional.cross_entropy(call(width, t, x[rows]), y[rows])

    old = descended(start(8, 0), cross(8), 120, 0.1, len(x))
    new = descended(start(16, 10), cross(16), 150, 0.1, len(x))
    z_old, z_new = call(8, old, x), call(16, new, x)

    def kept(t: dict[str, Tensor], rows: Tensor) -> Tensor:
        return compatible_distillation(call(16, t, x[rows]), z_old[rows], z_new[rows], y[rows])

    compatible = descended(new, kept, 200, 0.1, len(x))
    before = call(8, old, held)
    plain, found = update_compatibility(before, call(16, new, held), labels), update_compatibility(before, call(16, compatible, held), labels)
    fewer = flip_reduction(plain, found)
    assert plain.gain.low > 0, "the update is one"
    assert fewer.value < -0.2 * plain.negative.value
    assert found.inconsistent.value < plain.inconsistent.value
    assert found.gain.value > plain.gain.value - 0.01
