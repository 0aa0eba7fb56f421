"""Merges of low-rank factors (KnOTS, core space, averages of factors) against NumPy on dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import exapt
from exapt.algebra.lowrank import LowRank, concatenated
from exapt.algebra.rules.core_space import core_space_merged, in_core_space
from exapt.algebra.rules.factor_average import factor_averaged
from exapt.algebra.rules.knots import knots_merged, tied
from exapt.algebra.tensors import merge_tensors


def drawn(d_out: int, d_in: int, rank: int, seed: int) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(d_out, rank, generator=g, dtype=torch.float64), torch.randn(rank, d_in, generator=g, dtype=torch.float64))


TERMS = [drawn(9, 7, r, i) for i, r in enumerate((2, 3, 1))]


def trimmed(deltas: Tensor, weights: Tensor | None = None, *, density: float = 0.3) -> Tensor:
    """A rule that is not linear, and blind to a basis vector's sign: TIES by sums."""
    flat = deltas.flatten(1)
    least = flat.abs().quantile(1 - density, dim=1, keepdim=True)
    kept = torch.where(flat.abs() >= least, flat, 0.0)
    kept = kept if weights is None else weights[:, None] * kept
    agree = kept.sign() == kept.sum(0).sign()
    return ((kept * agree).sum(0) / agree.sum(0).clamp_min(1)).reshape(deltas.shape[1:])


def ties(deltas: list[np.ndarray], density: float, w: list[float] | None = None) -> np.ndarray:
    kept = np.stack([np.where(np.abs(d) >= np.quantile(np.abs(d), 1 - density), d, 0) for d in deltas])
    kept = kept if w is None else np.array(w)[:, None, None] * kept
    agree = np.sign(kept) == np.sign(kept.sum(0))
    return (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)


def dense(terms: list[LowRank]) -> list[np.ndarray]:
    return [t.B.numpy() @ t.A.numpy() for t in terms]


def knots(deltas: list[np.ndarray], density: float, w: list[float] | None = None) -> np.ndarray:
    u, s, vh = np.linalg.svd(np.concatenate(deltas, 1), full_matrices=False)
    keep = s > 1e-9
    coordinates = np.split(s[keep, None] * vh[keep], len(deltas), 1)
    return u[:, keep] @ ties(coordinates, density, w)


@pytest.mark.parametrize("w", [None, [1.0, 0.5, 2.0]])
def test_knots_is_the_rule_in_the_shared_basis(w: list[float] | None) -> None:
    stacked = torch.stack([t.dense() for t in TERMS])
    weights = None if w is None else torch.tensor(w, dtype=torch.float64)
    expected = knots(dense(TERMS), 0.4, w)
    how: dict[str, Any] = {"inner": trimmed, "settings": {"density": 0.4}}
    np.testing.assert_allclose(tied(stacked, weights, **how).numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(knots_merged(TERMS, w, **how).dense().numpy(), expected, atol=1e-10)
    other = knots([d.T for d in dense(TERMS)], 0.4, w).T
    np.testing.assert_allclose(tied(stacked, weights, side="right", **how).numpy(), other, atol=1e-10)
    assert not np.allclose(expected, ties(dense(TERMS), 0.4, w))


def test_knots_of_vectors_and_convolutions() -> None:
    vectors = torch.randn(3, 5)
    assert torch.equal(tied(vectors, inner=trimmed), trimmed(vectors))
    kernels = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    flat = tied(kernels.flatten(2), inner=trimmed)
    torch.testing.assert_close(tied(kernels, inner=trimmed), flat.reshape(4, 2, 3, 3))


def test_knots_merges_whole_models_and_a_rule_that_draws() -> None:
    base = {"w": torch.randn(4, 3), "b": torch.randn(4)}
    models = [{k: t + 0.1 * torch.randn_like(t) for k, t in base.items()} for _ in range(2)]
    merged = merge_tensors("knots", models, base, inner="task_arithmetic", settings={"scale": 0.5})
    for k, t in base.items():
        torch.testing.assert_close(merged[k], t + 0.5 * sum(m[k] - t for m in models))

    def dropped(deltas: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (deltas * (torch.rand(deltas.shape, generator=generator) < 0.5)).sum(0)

    one, two = (merge_tensors("knots", models, base, inner=dropped, seed=s) for s in (0, 1))
    assert torch.equal(one["w"], merge_tensors("knots", models, base, inner=dropped)["w"])
    assert not torch.equal(one["w"], two["w"])
    assert torch.equal(merge_tensors("knots", [base, base], base, inner="task_arithmetic")["w"], base["w"])


@pytest.mark.parametrize("w", [None, [1.0, 0.5, 2.0]])
def test_core_space_is_the_rule_on_the_cores(w: list[float] | None) -> None:
    u = np.linalg.svd(np.concatenate([t.B.numpy() for t in TERMS], 1), full_matrices=False)[0]
    vh = np.linalg.svd(np.concatenate([t.A.numpy() for t in TERMS], 0), full_matrices=False)[2]
    cores = [u.T @ d @ vh.T for d in dense(TERMS)]
    for core, d in zip(cores, dense(TERMS), strict=True):
        np.testing.assert_allclose(u @ core @ vh, d, atol=1e-12)  # nothing is lost
    merged = core_space_merged(TERMS, w, inner=trimmed, settings={"density": 0.4})
    np.testing.assert_allclose(merged.dense().numpy(), u @ ties(cores, 0.4, w) @ vh, atol=1e-10)
    assert merged.rank == 6


def test_core_space_of_matrices_takes_their_balanced_factors() -> None:
    balanced = [t.compressed(rank=t.rank)[0] for t in TERMS]
    stacked, settings = torch.stack([t.dense() for t in TERMS]), {"density": 0.4}
    expected = core_space_merged(balanced, inner=trimmed, settings=settings).dense()
    torch.testing.assert_close(in_core_space(stacked, inner=trimmed, settings=settings), expected)
    kernels = stacked.reshape(3, 9, 7, 1, 1)
    torch.testing.assert_close(in_core_space(kernels, inner=trimmed, settings=settings), expected.reshape(9, 7, 1, 1))
    assert torch.equal(in_core_space(stacked[:, 0], inner=trimmed), trimmed(stacked[:, 0]))


@pytest.mark.parametrize("rule", ["knots", "core_space"])
def test_models_that_are_the_base_change_nothing(rule: str) -> None:
    base = {"w": torch.randn(4, 3), "b": torch.randn(4)}
    merged = merge_tensors(rule, [base, base], base)  # with TIES inside
    assert all(torch.equal(merged[k], base[k]) for k in base)
    still = 0.0 * TERMS[0]
    for merge in (core_space_merged, knots_merged):
        assert not merge([still, still], inner="ties").dense().any()


def test_dare_and_ties_of_the_catalogue_inside() -> None:
    for rule in ("dare", "ties", "della", "tsv", "iso_c"):
        for merge in (core_space_merged, knots_merged):
            merged = merge(TERMS, inner=rule, seed=3, name="w").dense()
            assert torch.equal(merged, merge(TERMS, inner=rule, seed=3, name="w").dense())
            assert merged.shape == (9, 7)
            assert bool(merged.isfinite().all())
            assert bool(merged.any())


@settings(deadline=None)  # the first call imports the rules
@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 50))
def test_a_linear_rule_is_the_same_in_every_space(d_out: int, d_in: int, ranks: list[int], seed: int) -> None:
    terms = [drawn(d_out, d_in, r, seed + i) for i, r in enumerate(ranks)]
    w = [0.5 + i for i in range(len(terms))]
    expected = concatenated(terms, w).dense()
    for merge in (core_space_merged, knots_merged):
        torch.testing.assert_close(merge(terms, w, inner="task_arithmetic").dense(), expected, atol=1e-9, rtol=1e-9)


def test_average_of_factors_and_its_cross_terms() -> None:
    terms, w = [drawn(5, 4, 2, i) for i in range(3)], [0.2, 0.3, 0.5]
    found = factor_averaged(terms, w)
    b, a = (sum(c * getattr(t, k).numpy() for c, t in zip(w, terms, strict=True)) for k in "BA")
    exact = sum(c * d for c, d in zip(w, dense(terms), strict=True))
    np.testing.assert_allclose(found.merged.dense().numpy(), b @ a)
    np.testing.assert_allclose(found.exact.dense().numpy(), exact)
    pairs = [(i, j) for i in range(3) for j in range(3)]
    said = -0.5 * sum(w[i] * w[j] * (terms[i].B - terms[j].B).numpy() @ (terms[i].A - terms[j].A).numpy() for i, j in pairs)
    np.testing.assert_allclose(found.cross.dense().numpy(), said, atol=1e-12)
    assert found.relative == pytest.approx(np.linalg.norm(said) / np.linalg.norm(exact))
    same = [LowRank(t.B, terms[0].A) for t in terms]  # one factor shared (LoRA-FA): averaging the other is exact
    assert factor_averaged(same, w).relative < 1e-12


def test_average_of_factors_by_roots_is_pefts_linear_combination() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    base = torch.nn.Sequential(torch.nn.Linear(6, 5))
    options = {"target_modules": ["0"], "r": 2, "lora_alpha": 2, "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(**options), adapter_name="x")
    model.add_adapter("y", peft.LoraConfig(**options))
    model.base_model.add_weighted_adapter(["x", "y"], [0.3, 1.2], "both", combination_type="linear")
    layer = model.base_model.model[0]
    terms = [LowRank(layer.lora_B[n].weight.detach(), layer.lora_A[n].weight.detach()) for n in "xy"]
    torch.testing.assert_close(factor_averaged(terms, [0.3, 1.2], root=True).merged.dense(), layer.get_delta_weight("both").detach())


def test_bad_input() -> None:
    def with_base(deltas: Tensor, base: Tensor | None = None) -> Tensor:
        return deltas[0]

    with pytest.raises(exapt.InputError, match="knots: with_base needs the base"):
        tied(torch.zeros(2, 3, 3), inner=with_base)
    with pytest.raises(exapt.InputError, match="core_space: with_base needs the base"):
        core_space_merged(TERMS, inner=with_base)
    with pytest.raises(exapt.InputError, match='has no "densty"'):
        core_space_merged(TERMS, inner=trimmed, settings={"densty": 1})
    with pytest.raises(exapt.InputError, match="matrix 1 is 3x3, the first 9x7"):
        knots_merged([TERMS[0], drawn(3, 3, 1, 0)], inner=trimmed)
    with pytest.raises(exapt.InputError, match=r"core_space: 2 weights .* for 3 low-rank"):
        core_space_merged(TERMS, [1.0, 2.0])
    with pytest.raises(exapt.InputError, match=r"the ranks are \[2, 3, 1\]"):
        factor_averaged(TERMS)
    with pytest.raises(exapt.InputError, match="root=True takes square roots"):
        factor_averaged(TERMS[:1], [-1.0], root=True)
    with pytest.raises(exapt.InputError, match="there is no low-rank matrix"):
        factor_averaged([])
