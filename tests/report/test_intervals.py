"""Intervals against formulas and simulations."""

import numpy as np
import pytest

from exapt import InputError
from exapt.report import accuracy, compare, confusion, decompose


def test_width_is_that_of_the_binomial():
    right = np.repeat([1, 0], [160, 40])
    shown = accuracy(right, draws=4000)
    expected = 1.96 * (0.8 * 0.2 / 200) ** 0.5
    assert shown.value == 0.8
    assert shown.high - shown.value == pytest.approx(expected, rel=0.12)
    assert shown.value - shown.low == pytest.approx(expected, rel=0.12)


def test_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [accuracy(rng.random(150) < 0.8, draws=400, seed=i).contains(0.8) for i in range(300)]
    assert 0.90 <= np.mean(hits) <= 0.99


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.8
    b = a.copy()
    b[:8] = ~b[:8]
    paired = compare(a, b)
    apart = compare(a, rng.permutation(b))
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)
    assert compare(a, a).low == compare(a, a).high == 0


def test_same_seed_same_interval():
    right = [1, 0, 1, 1, 0, 1]
    assert accuracy(right, seed=3) == accuracy(right, seed=3)
    assert accuracy(right, seed=3) != accuracy(right, seed=4, level=0.5)


def test_decomposition_adds_up_and_separates_the_causes():
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 2, 600)
    old = rng.random(600) < 0.95
    member = (classes == 1) | (rng.random(600) < 0.2)
    only_mix = decompose(old, old, member)
    assert only_mix.inputs.value == only_mix.inputs.low == only_mix.inputs.high == 0
    only_inputs = decompose(old, old & (rng.random(600) < 0.8), np.ones(600, bool))
    assert only_inputs.mix.value == only_inputs.mix.low == only_inputs.mix.high == 0
    assert only_inputs.inputs.high < 0
    new = np.where(classes == 1, old & (rng.random(600) < 0.6), old)
    both = decompose(old, new, member)
    assert both.drop.value == pytest.approx(both.inputs.value + both.mix.value, abs=1e-12)
    assert both.target.value == pytest.approx(new[member].mean())
    assert both.inputs.high < 0
    assert both.mix.high < 0


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="at least one row"):
        accuracy([])
    with pytest.raises(InputError, match="same rows"):
        compare([1, 0], [1])
    with pytest.raises(InputError, match="empty"):
        decompose([1, 1], [1, 0], [0, 0])
    with pytest.raises(InputError, match="same rows"):
        decompose([1, 1], [1], [1, 1])
    with pytest.raises(InputError, match="one value per row"):
        accuracy([[1, 0]])
    with pytest.raises(InputError, match="'c' is not one of a, b"):
        confusion(["a"], ["c"], ["a", "b"])
