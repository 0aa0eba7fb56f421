"""Base weights in few bits: ShiftAddLLM and QUAD, against NumPy and against what each claims."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

import exapt
from exapt.algebra.compress.quad import quad_decomposed, symmetric
from exapt.algebra.compress.shift_add import allocated_bits, binary_coded, powers, sensitivity, shift_added


def inputs(rows: int = 400, d: int = 24) -> torch.Tensor:
    """Correlated activations, three features of which are far larger than the rest, as in language models."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, d, generator=generator) @ (torch.eye(d) + 0.4 * torch.randn(d, d, generator=generator))
    x[:, [i for i in (2, 11, 17) if i < d]] *= 30
    return x


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_binary_codes_are_at_a_fixed_point(bits: int) -> None:
    w = np.random.default_rng(0).normal(size=(4, 60))
    signs, scales = (t.numpy() for t in binary_coded(torch.from_numpy(w), bits, rounds=60, terms=0))
    for row, b, alpha in zip(w, signs, scales, strict=True):
        best = np.linalg.lstsq(b, row, rcond=None)[0]  # the scales are least squares for the signs ...
        np.testing.assert_allclose(alpha, best, rtol=1e-6)
        sums = np.array([np.dot(s, alpha) for s in product((-1, 1), repeat=bits)])
        np.testing.assert_allclose(np.abs(row - b @ alpha), np.abs(row[:, None] - sums).min(1), rtol=1e-9)  # ... and the signs the nearest


def test_scales_are_sums_of_powers_of_two() -> None:
    x = torch.rand(200, dtype=torch.double) + 1e-3
    once = powers(x, 1)
    assert torch.equal(once.log2(), once.log2().round())
    assert float((once.log2() - x.log2()).abs().max()) <= 0.5
    errors = [float((powers(x, t) - x).abs().max()) for t in (1, 2, 3)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    made = shift_added(torch.randn(16, 10), 2, terms=1)
    assert torch.equal(made.scales.log2(), made.scales.log2().round())


def test_shift_add_weight_is_what_its_parts_say() -> None:
    w = torch.randn(12, 10)
    for options in ({}, {"group": 4}, {"moment": inputs(50, 10).T @ inputs(50, 10)}):
        made = shift_added(w, 3, **options)
        groups = made.scales.shape[1]
        assert (made.signs.shape, groups) == ((3, 12, 10), 12 // options.get("group", 12))
        assert set(made.signs.unique().tolist()) == {-1, 1}
        whole = sum(made.signs[i].numpy() * np.repeat(made.scales[i].numpy(), 12 // groups, axis=0) for i in range(3))
        np.testing.assert_allclose(made.weight.numpy(), whole, rtol=1e-5, atol=1e-6)
        assert made.error == pytest.approx(float((made.weight - w).norm() / w.norm()), rel=1e-4)


def test_more_bits_and_smaller_groups_are_closer() -> None:
    w = torch.randn(64, 20)
    errors = [shift_added(w, b).error for b in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.15
    assert shift_added(w, 3, group=8).error < errors[2]


def test_the_second_objective_lowers_the_output_error() -> None:
    x, w = inputs(), torch.randn(32, 24, generator=torch.Generator().manual_seed(1))
    moment = x.T @ x
    plain, both = shift_added(w, 2), shift_added(w, 2, moment=moment)
    y = x @ w.T
    errors = [float((x @ m.weight.T - y).norm() / y.norm()) for m in (plain, both)]
    assert both.output_error == pytest.approx(errors[1], rel=1e-3)
    assert errors[1] < 0.85 * errors[0]
    assert errors[1] < shift_added(w, 2, moment=moment, ordered=False).output_error < errors[0]
    assert plain.error <= both.error  # what is gained on the outputs is paid for on the weights


def test_bits_are_allocated_as_trying_all_would() -> None:
    rng = np.random.default_rng(0)
    errors, sizes, choices = rng.random((5, 3)).cumsum(1)[:, ::-1], [10, 20, 30, 10, 5], [2, 3, 4]
    best = min(
        (sum(errors[i, c] for i, c in enumerate(p)), p) for p in product(range(3), repeat=5) if np.dot(sizes, [choices[c] for c in p]) <= 2.8 * sum(sizes)
    )[1]
    assert allocated_bits(errors.tolist(), sizes, choices, 2.8) == [choices[c] for c in best]
    with pytest.raises(exapt.InputError, match="nothing fits"):
        allocated_bits(errors.tolist(), sizes, choices, 1.5)


def test_sensitivity_against_its_formula() -> None:
    x, w = inputs(100, 6).double().numpy(), np.random.default_rng(0).normal(size=(4, 6))
    h = x.T @ x
    h += 0.01 * np.trace(h) / 6 * np.eye(6)
    scaled = w / np.diag(np.linalg.cholesky(np.linalg.inv(h)).T)
    found = sensitivity(torch.from_numpy(w), torch.from_numpy(x.T @ x))
    assert found == pytest.approx(np.linalg.norm(scaled) * scaled.std(ddof=1) ** 2, rel=1e-6)


def test_quad_is_exact_but_for_its_rounding() -> None:
    x, w = inputs().double(), torch.randn(10, 24, dtype=torch.double)
    made = quad_decomposed(w, x.T @ x, 3, bits=8, activation_bits=0)
    u = np.linalg.svd(x.numpy(), full_matrices=False)[2][:3].T
    np.testing.assert_allclose((made.directions @ made.directions.T).numpy(), u @ u.T, atol=1e-8)
    keeps = np.eye(24) - u @ u.T
    rest = w.numpy() @ keeps @ made.rotation.numpy()
    scale = np.abs(rest).max(1, keepdims=True) / 127
    whole = w.numpy() @ u @ u.T + np.round(rest / scale) * scale @ made.rotation.numpy().T @ keeps
    np.testing.assert_allclose(made.weight.numpy(), whole, atol=1e-7)
    np.testing.assert_allclose(made(x).numpy(), x.numpy() @ whole.T, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(made.rotation.numpy() @ made.rotation.numpy().T, np.eye(24), atol=1e-12)


def test_quad_keeps_four_bits_usable_where_activations_have_outliers() -> None:
    x, w = inputs(), torch.randn(10, 24, generator=torch.Generator().manual_seed(2))
    fresh = inputs(700)[400:]
    y = fresh @ w.T
    with_, rotated, plain = (float((quad_decomposed(w, x.T @ x, k, rotate=r)(fresh) - y).norm() / y.norm()) for k, r in ((3, True), (0, True), (0, False)))
    assert with_ < 0.25 * min(rotated, plain)


def test_quad_outlier_weights_train() -> None:
    x, w = inputs(), torch.randn(10, 24)
    made = quad_decomposed(w, x.T @ x, 3)
    made.outlier.requires_grad_(True)
    made(x).square().mean().backward()
    assert float(made.outlier.grad.abs().min()) > 0


def test_symmetric_codes_are_within_half_a_step() -> None:
    x = torch.randn(5, 40)
    for bits in (2, 4, 8):
        codes, scale = symmetric(x, bits)
        assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
        assert bool(((codes * scale - x).abs() <= 0.5001 * scale).all())
    assert torch.equal(symmetric(torch.zeros(2, 3), 4)[0], torch.zeros(2, 3, dtype=torch.int8))


def test_bad_input_is_refused() -> None:
    w = torch.randn(6, 4)
    for call, said in (
        (lambda: shift_added(w, 0), "bits=0"), (lambda: shift_added(w, group=4), "a group that divides"),
        (lambda: shift_added(torch.randn(3)), "give a matrix"),
        (lambda: shift_added(w, moment=torch.eye(6)), "the moment has shape"), (lambda: shift_added(w / 0), "not finite"),
        (lambda: quad_decomposed(w, torch.eye(6)), "the moment is"), (lambda: quad_decomposed(w, torch.eye(4), 5), "directions=5"),
        (lambda: quad_decomposed(w, torch.eye(4), 2, bits=1), "bits=1"),
    ):  # fmt: skip
        with pytest.raises(exapt.InputError, match=said):
            call()
