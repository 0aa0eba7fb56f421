"""The closed forms of editing against NumPy: from the papers' statements, not from their solutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import exapt
from exapt.algebra.edit.closed_form import least_squares, null_space, projected, rank_one, regularised
from exapt.algebra.edit.hypernetwork import EditNetwork
from exapt.algebra.edit.moments import Moments
from exapt.algebra.edit.ultraedit import solved

D_OUT, D_IN = 5, 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape))


def covariance(rank: int = 30) -> Tensor:
    k = draw(rank, D_IN, seed=9)
    return k.T @ k / rank


def test_rome_satisfies_its_constraint_and_is_the_constrained_optimum() -> None:
    k, r, c = draw(D_IN), draw(D_OUT), covariance()
    delta = rank_one(r, k, c)
    np.testing.assert_allclose((delta @ k).numpy(), r.numpy(), atol=1e-12)
    # the optimum of tr(D C D') with D k = r by the KKT system of each row, solved as one linear system in NumPy
    n = D_IN + 1
    system = np.zeros((n, n))
    system[:D_IN, :D_IN], system[:D_IN, -1], system[-1, :D_IN] = 2 * c.numpy(), k.numpy(), k.numpy()
    expected = np.stack([np.linalg.solve(system, np.append(np.zeros(D_IN), x))[:D_IN] for x in r.numpy()])
    np.testing.assert_allclose(delta.numpy(), expected, rtol=1e-9)
    assert np.linalg.matrix_rank(delta.numpy()) == 1
    apart = rank_one(r, k, c, mean_key=draw(D_IN, seed=3))
    np.testing.assert_allclose((apart @ k).numpy(), r.numpy(), atol=1e-12)
    assert torch.trace(apart @ c @ apart.T) > torch.trace(delta @ c @ delta.T)


def test_memit_solves_its_normal_equations() -> None:
    keys, r, c = draw(3, D_IN), draw(3, D_OUT), 4 * covariance()
    delta = least_squares(r, keys, c).numpy()
    # stacked least squares in NumPy: old keys (a square root of C0) to nothing, new ones to their residuals
    rows = np.vstack([np.linalg.cholesky(c.numpy()).T, keys.numpy()])
    wanted = np.vstack([np.zeros((D_IN, D_OUT)), r.numpy()])
    np.testing.assert_allclose(delta, np.linalg.lstsq(rows, wanted, rcond=None)[0].T, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(delta @ (c.numpy() + keys.numpy().T @ keys.numpy()), r.numpy().T @ keys.numpy(), atol=1e-10)
    tight = least_squares(r, keys, 1e-9 * c)
    np.testing.assert_allclose((tight @ keys.T).numpy(), r.numpy().T, atol=1e-5)


def test_alphaedit_leaves_old_keys_alone_and_matches_its_formula() -> None:
    old, keys, past_keys, r = draw(4, D_IN, seed=2), draw(2, D_IN), draw(2, D_IN, seed=5), draw(2, D_OUT)
    basis = null_space(old.T @ old / 4, 1e-8)
    p = basis @ basis.T
    np.testing.assert_allclose((p @ p).numpy(), p.numpy(), atol=1e-12)
    assert round(float(p.trace())) == D_IN - 4
    past = past_keys.T @ past_keys
    delta = projected(r, keys, basis, basis.T @ past @ basis)
    np.testing.assert_allclose((delta @ old.T).numpy(), 0, atol=1e-12)
    k, q = keys.numpy().T, p.numpy()
    expected = r.numpy().T @ k.T @ q @ np.linalg.inv(past.numpy() @ q + k @ k.T @ q + np.eye(D_IN))
    np.testing.assert_allclose(delta.numpy(), expected, atol=1e-10)
    # and it is the optimum of |(DP) K - R|^2 + |DP|^2 + |(DP) Kp|^2 over D, found by least squares on the free coordinates
    u = np.linalg.svd(old.numpy())[2][4:].T
    rows = np.vstack([k.T @ u, past_keys.numpy() @ u, np.eye(u.shape[1])])
    free = np.linalg.lstsq(rows, np.vstack([r.numpy(), np.zeros((2 + u.shape[1], D_OUT))]), rcond=None)[0]
    np.testing.assert_allclose(delta.numpy(), (u @ free).T, atol=1e-10)
    with pytest.raises(exapt.InputError, match="no direction of the keys lies below the threshold"):
        null_space(torch.eye(3), 0.02)


def test_moments_are_those_of_all_rows() -> None:
    x = draw(23, 4)
    moments = Moments()
    for part in x.split([1, 5, 10, 7]):
        moments.update(part)
    expected = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0, ddof=1)
    np.testing.assert_allclose(moments.normalised(x).numpy(), expected, rtol=1e-9)
    one = Moments()
    one.update(x[:1])
    with pytest.raises(exapt.InputError, match="has seen 1 rows and needs two"):
        one.normalised(x)


def test_ultraedit_against_numpy() -> None:
    h, g, other = draw(6, D_IN), draw(6, D_OUT, seed=1), draw(9, D_IN + D_OUT, seed=4)
    moments = Moments()
    moments.update(other)
    moments.update(torch.cat([h, g], -1))
    delta = solved(h, g, moments, 0.01)
    every = np.vstack([other.numpy(), np.hstack([h.numpy(), g.numpy()])])
    normal = (np.hstack([h.numpy(), g.numpy()]) - every.mean(0)) / every.std(0, ddof=1)
    v = -0.01 * (normal[:, :D_IN] ** 2).sum(1, keepdims=True) * normal[:, D_IN:]
    rows = np.vstack([h.numpy(), np.eye(D_IN)])
    expected = np.linalg.lstsq(rows, np.vstack([v, np.zeros((D_IN, D_OUT))]), rcond=None)[0].T
    np.testing.assert_allclose(delta.numpy(), expected, rtol=1e-8)


def test_mend_and_malmen_against_numpy() -> None:
    network = EditNetwork(D_IN, D_OUT, 3, 2, 2, 0.1, torch.Generator().manual_seed(0)).double()
    k, g = draw(6, D_IN), draw(6, D_OUT, seed=1)
    network.moments.update(torch.cat([k, g], -1))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * draw(*p.shape, seed=8))
    x = np.hstack([k.numpy(), g.numpy()])
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    t = {n: p.detach().numpy() for n, p in network.named_parameters()}
    for i in range(2):
        x = x + t[f"scale.{i}"][1] * np.maximum(x @ t[f"A.{i}"] @ t[f"B.{i}"] + t[f"bias.{i}"], 0) + t[f"shift.{i}"][1]
    pk, pg, rate = x[:, :D_IN], x[:, D_IN:], t["rate"][1]
    mend = exapt.MEND().update(network, k, g, 1).detach().numpy()
    np.testing.assert_allclose(mend, -rate * sum(np.outer(a, b) for a, b in zip(pg, pk, strict=True)), rtol=1e-8)
    malmen = exapt.MALMEN().update(network, k, g, 1).detach().numpy()
    d = -rate * (k.numpy() * pk).sum(1, keepdims=True) * pg
    rows = np.vstack([k.numpy(), np.exp(t["penalty"][1] / 2) * np.eye(D_IN)])
    np.testing.assert_allclose(malmen, np.linalg.lstsq(rows, np.vstack([d, np.zeros((D_IN, D_OUT))]), rcond=None)[0].T, rtol=1e-7)


@pytest.mark.parametrize("n", [1, 5, 12])
def test_ridge_regression_by_the_smaller_system(n: int) -> None:
    draw = np.random.default_rng(n)
    k, v = draw.standard_normal((n, 7)), draw.standard_normal((n, 3))
    wanted = np.linalg.solve(k.T @ k + 0.3 * np.eye(7), k.T @ v).T
    np.testing.assert_allclose(regularised(torch.from_numpy(k), torch.from_numpy(v), torch.tensor(0.3)).numpy(), wanted, atol=1e-12)


def test_a_known_factor_changes_nothing() -> None:
    draw = np.random.default_rng(0)
    a = draw.standard_normal((20, 6))
    c, k, r = (torch.from_numpy(x) for x in (a.T @ a, draw.standard_normal((3, 6)), draw.standard_normal((3, 4))))
    factor = torch.linalg.cholesky(c)
    torch.testing.assert_close(least_squares(r, k, c, factor), least_squares(r, k, c))
    torch.testing.assert_close(rank_one(r[0], k[0], c, k[1], factor), rank_one(r[0], k[0], c, k[1]))
