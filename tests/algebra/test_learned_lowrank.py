"""Low-rank task vectors against the same computations on dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exapt
from exapt.algebra.lowrank import LowRank, concatenated


def drawn(d_out: int, d_in: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(d_out, rank, generator=g, dtype=dtype), torch.randn(rank, d_in, generator=g, dtype=dtype))


def dense(m: LowRank) -> np.ndarray:
    return m.B.numpy() @ m.A.numpy()


sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))
ranks = st.lists(st.integers(1, 5), min_size=1, max_size=4)
weights = st.floats(-3, 3, allow_nan=False, width=32)


@settings(deadline=None)
@given(sizes, ranks, st.lists(weights, min_size=4, max_size=4), st.integers(0, 99))
def test_low_rank_merge_equals_dense_merge(size: tuple[int, int], ranks: list[int], w: list[float], seed: int) -> None:
    terms = [drawn(*size, r, seed + i) for i, r in enumerate(ranks)]
    merged = concatenated(terms, w[: len(terms)])
    assert merged.rank == sum(ranks)
    expected = sum(c * dense(t) for c, t in zip(w, terms, strict=False))
    np.testing.assert_allclose(merged.dense().numpy(), expected, atol=1e-12)
    again, error = merged.compressed(rank=min(size))  # as large as the matrix can be
    assert error == 0
    np.testing.assert_allclose(again.dense().numpy(), expected, atol=1e-9)


@settings(deadline=None)
@given(sizes, st.integers(1, 4), st.integers(1, 4), weights, weights, st.integers(0, 99))
def test_linear(size: tuple[int, int], r: int, s: int, a: float, b: float, seed: int) -> None:
    one, two = drawn(*size, r, seed), drawn(*size, s, seed + 1)
    other = drawn(*size, 2, seed + 2)
    mixed = a * one - (-b) * two
    np.testing.assert_allclose(mixed.dense().numpy(), a * dense(one) + b * dense(two), atol=1e-12)
    assert mixed.inner(other) == pytest.approx(a * one.inner(other) + b * two.inner(other), abs=1e-9)
    assert concatenated([one, two]).norm() == pytest.approx(concatenated([two, one]).norm())
    assert (one - one).norm() < 1e-12 * max(1.0, one.norm())


@settings(deadline=None)
@given(sizes, st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_the_error_of_compression_is_that_of_the_dense_matrix(size: tuple[int, int], r: int, keep: int, seed: int) -> None:
    full = drawn(*size, r, seed)
    made, error = full.compressed(rank=keep)
    w = dense(full)
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    best = (u[:, :keep] * s[:keep]) @ vh[:keep]
    np.testing.assert_allclose(made.dense().numpy(), best, atol=1e-8)
    assert error == pytest.approx(np.linalg.norm(w - best) / np.linalg.norm(w), abs=1e-9)
    assert error == pytest.approx(np.linalg.norm(w - dense(made)) / np.linalg.norm(w), abs=1e-9)
    assert made.rank <= min(keep, r, *size)


def test_compression_to_an_error_takes_the_smallest_rank() -> None:
    full = LowRank(torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])), torch.eye(4))
    norm = math.sqrt(85)
    for bound, rank in ((0.0, 4), (1 / norm + 1e-6, 3), (1 / norm - 1e-6, 4), (math.sqrt(21) / norm + 1e-6, 1), (2.0, 1)):
        made, error = full.compressed(error=bound)
        assert (made.rank, error <= bound) == (rank, True)
    nothing, error = (full - full).compressed(rank=2)
    assert error == 0 or nothing.norm() < 1e-6


@settings(deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_norm_inner_and_angle(size: tuple[int, int], r: int, s: int, seed: int) -> None:
    one, two = drawn(*size, r, seed), drawn(*size, s, seed + 1)
    x, y = dense(one).ravel(), dense(two).ravel()
    assert one.norm() == pytest.approx(np.linalg.norm(x))
    assert one.inner(two) == pytest.approx(x @ y)
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert math.cos(one.angle(two)) == pytest.approx(cosine, abs=1e-9)


def test_a_small_angle_is_exact_and_factors_keep_their_type() -> None:
    one = LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0]]))
    tilted = LowRank(torch.tensor([[1.0], [1e-6]]), torch.tensor([[1.0]]))
    assert one.angle(tilted) == pytest.approx(1e-6, rel=1e-5)  # the arc cosine of a single would give 0
    assert one.angle(-one) == pytest.approx(math.pi)
    assert math.isnan(one.angle(0.0 * one))
    half = LowRank(one.B.bfloat16(), one.A.bfloat16())
    made, _ = half.compressed(rank=1)
    assert made.B.dtype == made.A.dtype == torch.bfloat16


def test_a_large_matrix_is_never_made() -> None:
    d = 400_000  # dense: 1.2 TB
    wide = LowRank(torch.ones(d, 2), torch.ones(2, d))
    merged, error = concatenated([wide, wide], [0.5, 0.25]).compressed(rank=1)
    assert merged.rank == 1
    assert error < 1e-7
    assert merged.norm() == pytest.approx(1.5 * d, rel=1e-6)


def test_bad_input() -> None:
    good = drawn(3, 4, 2, 0)
    with pytest.raises(exapt.InputError, match=r"B \(3, 2\) and A \(3, 4\) are no factors"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(exapt.InputError, match="one floating-point type"):
        LowRank(torch.zeros(3, 2), torch.zeros(2, 4).double())
    with pytest.raises(exapt.InputError, match="matrix 1 is 4x4, the first 3x4"):
        concatenated([good, drawn(4, 4, 2, 0)])
    with pytest.raises(exapt.InputError, match="convert them to one type"):
        concatenated([good, drawn(3, 4, 2, 0, torch.float32)])
    with pytest.raises(exapt.InputError, match=r"2 weights .* for 1 low-rank"):
        concatenated([good], [1.0, 2.0])
    with pytest.raises(exapt.InputError, match="there is no low-rank matrix"):
        concatenated([])
    with pytest.raises(exapt.InputError, match="a rank from 1 or an error from 0"):
        good.compressed()
    with pytest.raises(exapt.InputError, match="rank is 0"):
        good.compressed(rank=0)
    with pytest.raises(exapt.InputError, match="B holds NaN"):
        LowRank(torch.full((2, 1), math.nan), torch.ones(1, 2)).norm()
