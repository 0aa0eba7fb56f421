"""What holds for all task vectors: pieces and rules under hypothesis, ties and zeros included."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from exapt.algebra.rule import rule_of
from exapt.algebra.sparsify import Consensus, agreeing, combined, kept, largest, rank_probabilities, smallest, sparsified, without_outliers
from exapt.algebra.tensors import merge_tensors

few = settings(max_examples=40, deadline=None)


@st.composite
def vectors(draw: st.DrawFn, models: int | None = None) -> Tensor:
    """Task vectors (m, ...) of small whole numbers over 4, so that there are equal sizes and zeros, or of continuous ones."""
    m = models or draw(st.integers(2, 4))
    shape = draw(st.sampled_from([(1,), (7,), (20,), (3, 5), (2, 3, 4), ()]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    if draw(st.booleans()):
        return torch.randint(-4, 5, (m, *shape), generator=g) / 4
    return torch.randn(m, *shape, generator=g)


shares = st.floats(0, 1, allow_nan=False)
ON_DELTAS: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {}), ("ties", {"density": 0.4}), ("ties", {"consensus": "count", "density": 0.6}), ("breadcrumbs", {"density": 0.5, "gamma": 0.2}),
    ("breadcrumbs", {"density": 0.7, "gamma": 0.1, "consensus": "sum"}), ("sce", {"density": 0.5}), ("model_stock", {}), ("ram", {"epsilon": 0.0}),
]  # fmt: skip
RANDOM: list[tuple[str, dict[str, Any]]] = [("dare", {"density": 0.4}), ("della", {"density": 0.4}), ("dare", {"consensus": "sum"})]
ON_MODELS: list[tuple[str, dict[str, Any]]] = [("average", {}), ("karcher", {}), ("multislerp", {})]
WEIGHTED = ("task_arithmetic", "ties", "breadcrumbs", "average", "karcher", "multislerp")


def call(rule: str, stacked: Tensor, config: dict[str, Any], weights: Tensor | None = None) -> Tensor:
    found = rule_of(rule)
    more = {"generator": torch.Generator().manual_seed(0)} if "generator" in found.given else {}
    return found.function(stacked, **({"weights": weights} if weights is not None else {}), **more, **config)


@few
@given(vectors(1), st.integers(-2, 30), st.integers(-2, 30))
def test_smallest_marks_as_many_as_asked_nested_and_none_larger_than_what_is_left(x: Tensor, a: int, b: int) -> None:
    a, b = sorted((a, b))
    small, more = smallest(x[0], a), smallest(x[0], b)
    assert int(small.sum()) == min(max(a, 0), x[0].numel())
    assert bool((more | ~small).all())
    if bool(small.any()) and not bool(small.all()):
        assert float(x[0][small].abs().max()) <= float(x[0][~small].abs().min())


@few
@given(vectors(1), shares)
def test_trimming_is_idempotent(x: Tensor, density: float) -> None:
    once = kept(x[0], largest(x[0], density))
    assert torch.equal(kept(once, largest(once, density)), once)
    assert bool(((once == x[0]) | (once == 0)).all())


@few
@given(vectors(1), shares, shares)
def test_without_outliers_is_a_band_of_the_ordered_sizes(x: Tensor, density: float, gamma: float) -> None:
    mask, n = without_outliers(x[0], density, gamma), x[0].numel()
    count = int(density * n)
    low = max(0, n - count - int(gamma * n))
    ordered = x[0].abs().flatten().sort().values
    assert torch.equal(x[0][mask].abs().flatten().sort().values, ordered[low : low + count])


@few
@given(vectors(1), st.floats(0.2, 0.8), st.floats(0, 0.19))
def test_rank_probabilities_have_the_density_as_their_mean_and_rise_with_size(x: Tensor, density: float, epsilon: float) -> None:
    p = rank_probabilities(x[0], density, epsilon)
    assert float(p.mean()) == pytest.approx(density, abs=1e-5)
    rows, sizes = (t.reshape(len(x[0]) if x[0].ndim > 1 else 1, -1) for t in (p, x[0].abs()))
    for row, size in zip(rows, sizes, strict=True):
        larger = size[:, None] > size[None, :]
        assert bool((row[:, None] >= row[None, :])[larger].all())


@few
@given(vectors(), st.sampled_from(["sum", "count"]))
def test_agreeing_values_have_one_sign_and_their_mean_lies_among_them(x: Tensor, consensus: Consensus) -> None:
    mask = agreeing(x, consensus)
    assert not bool(((x > 0) & mask).any(0).logical_and(((x < 0) & mask).any(0)).any())
    mean = combined(x, consensus=consensus, normalise=True)
    assert bool((mean.abs() <= torch.where(mask, x, 0.0).abs().amax(0) + 1e-6).all())


@few
@given(vectors(), shares)
def test_l1_rescaling_restores_the_sum_of_sizes(x: Tensor, density: float) -> None:
    done = sparsified(x, density, lambda t, d: (largest(t, d), d), "l1")
    for before, after in zip(x, done, strict=True):
        total = float(after.abs().sum())
        assert total == pytest.approx(float(before.abs().sum()) if total else 0.0, rel=1e-5)


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties", "dare", "della", "breadcrumbs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@few
@given(x=vectors())
def test_scale_zero_gives_the_base_bit_for_bit(rule: str, dtype: torch.dtype, x: Tensor) -> None:
    base, *models = ({"w": t.to(dtype)} for t in x)
    assert torch.equal(merge_tensors(rule, models, base, scale=0.0)["w"], base["w"])


@pytest.mark.parametrize(
    ("rule", "config"),
    [
        ("ties", {"density": 1.0}), ("dare", {"density": 1.0, "normalise": True}), ("della", {"density": 1.0}), ("sce", {}), ("model_stock", {}),
        ("breadcrumbs", {"density": 1.0, "normalise": True}), ("ram", {"epsilon": 0.0}), ("average", {}), ("karcher", {}), ("ema", {}),
        ("ema", {"before": "mean"}), ("multislerp", {}), ("slerp", {"t": 0.3}), ("nuslerp", {}),
    ],
)  # fmt: skip
@few
@given(x=vectors(1), count=st.integers(2, 4))
def test_merging_identical_models_changes_nothing(rule: str, config: dict[str, Any], x: Tensor, count: int) -> None:
    same = x.repeat(2 if "slerp" in rule and rule != "multislerp" else count, *[1] * (x.ndim - 1))
    torch.testing.assert_close(call(rule, same, config), x[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rule", "config"), ON_DELTAS + ON_MODELS)
@few
@given(x=vectors(), order=st.permutations(range(4)))
def test_the_order_of_models_does_not_matter(rule: str, config: dict[str, Any], x: Tensor, order: list[int]) -> None:
    x = x + torch.arange(x[0].numel()).reshape(x[0].shape) / 64 if rule in ("karcher", "multislerp") else x  # no models that cancel out
    order = [i for i in order if i < len(x)]
    w = 0.5 + torch.arange(len(x)) / 4 if rule in WEIGHTED else None
    if rule == "multislerp" and x[0].numel() < 7:
        return  # directions of one number cancel out often, which it refuses
    torch.testing.assert_close(call(rule, x[order], config, None if w is None else w[order]), call(rule, x, config, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rule", "config"), ON_DELTAS + RANDOM)
@few
@given(x=vectors(), factor=st.sampled_from([0.25, 2.0, 1024.0, 2.0**-14]))
def test_the_size_of_updates_does_not_matter(rule: str, config: dict[str, Any], x: Tensor, factor: float) -> None:
    torch.testing.assert_close(call(rule, factor * x, config), factor * call(rule, x, config), rtol=1e-5, atol=1e-6 * factor)


@pytest.mark.parametrize(("rule", "config"), [("task_arithmetic", {"scale": 0.7}), ("dare", {"density": 0.4})])
@few
@given(x=vectors(2), y=vectors(2))
def test_linear_rules_are_linear(rule: str, config: dict[str, Any], x: Tensor, y: Tensor) -> None:
    """DARE too, as its masks do not look at the values."""
    if x.shape == y.shape:
        torch.testing.assert_close(call(rule, x + 2 * y, config), call(rule, x, config) + 2 * call(rule, y, config), rtol=1e-5, atol=1e-5)


@few
@given(vectors(1), st.floats(0, 2))
def test_nearswap_goes_no_further_than_its_bound(x: Tensor, t: float) -> None:
    ours = call("nearswap", x, {"t": t})
    assert bool((ours.abs() <= t + 1e-7).all())
    near = x[0].abs() <= t
    assert torch.equal(ours[near], x[0][near])


@pytest.mark.parametrize("rule", ["dare", "della"])
def test_random_rules_follow_the_seed_and_the_tensors_name(rule: str) -> None:
    base = {"a": torch.zeros(30), "b": torch.zeros(30)}
    models = [{k: torch.ones(30) for k in base} for _ in range(2)]
    first, again, other = (merge_tensors(rule, models, base, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) and not torch.equal(first[k], other[k]) for k in base)
    assert not torch.equal(first["a"], first["b"])
