"""Merge rules against computations from their papers in NumPy, entry by entry, and against what defines them."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from exapt.algebra.rules.arcee_fusion import arcee_fused
from exapt.algebra.rules.breadcrumbs import breadcrumbs_merged
from exapt.algebra.rules.dare import dare_merged
from exapt.algebra.rules.della import della_merged
from exapt.algebra.rules.ema import ema_merged
from exapt.algebra.rules.interpolate import interpolated
from exapt.algebra.rules.karcher import karcher_mean
from exapt.algebra.rules.model_stock import model_stock_merged
from exapt.algebra.rules.multislerp import multislerped
from exapt.algebra.rules.nearswap import near_swapped
from exapt.algebra.rules.nuslerp import nuslerped
from exapt.algebra.rules.ram import ram_merged
from exapt.algebra.rules.sce import sce_merged
from exapt.algebra.rules.slerp import slerped
from exapt.algebra.rules.ties import ties_merged
from exapt.algebra.sparsify import rank_probabilities

Array = npt.NDArray[np.float64]
W = [0.5, 2.0, 1.0]


def deltas(m: int = 3, shape: tuple[int, ...] = (6, 9), seed: int = 0) -> Tensor:
    return torch.randn(m, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor, expected: Array | Tensor, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(ours.numpy(), np.asarray(expected), rtol=tolerance, atol=tolerance)


def disjoint_mean(values: Array, weights: list[float]) -> Array:
    """Elected by the sum of weighted values, averaged over who agrees."""
    out = np.zeros(values.shape[1:])
    for at in np.ndindex(*out.shape):
        column = [w * v[at] for w, v in zip(weights, values, strict=True)]
        sign = 1 if sum(column) >= 0 else -1
        agree = [(w, c) for w, c in zip(weights, column, strict=True) if c * sign > 0]
        out[at] = sum(c for _, c in agree) / sum(w for w, _ in agree) if agree else 0.0
    return out


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages(density: float) -> None:
    x = deltas()
    trimmed = x.numpy().copy()
    for t in trimmed:
        order = np.argsort(np.abs(t).ravel())
        t.ravel()[order[: t.size - math.floor(density * t.size)]] = 0
    close(ties_merged(x, torch.tensor(W, dtype=x.dtype), density=density, scale=1.4), 1.4 * disjoint_mean(trimmed, W))


def test_dare_divides_by_the_density_and_keeps_the_expectation() -> None:
    x, d = deltas(2), 0.3
    once = dare_merged(x[:1], density=d, generator=torch.Generator().manual_seed(1))
    kept = once != 0
    assert 0 < int(kept.sum()) < kept.numel()
    close(once[kept], x[0][kept] / d)
    g = torch.Generator().manual_seed(2)
    mean = torch.stack([dare_merged(x, density=d, generator=g) for _ in range(500)]).mean(0)
    spread = (x.square().sum(0) * (1 - d) / d / 500).sqrt()
    assert bool(((mean - x.sum(0)).abs() < 5 * spread).all())


def test_della_divides_by_each_entrys_own_probability() -> None:
    x, d, epsilon = deltas(1), 0.5, 0.3
    p = np.empty(x.shape[1:])
    for row, sizes in zip(p, np.abs(x[0].numpy()), strict=True):
        row[np.argsort(sizes)] = np.linspace(d - epsilon, d + epsilon, len(sizes))
    close(rank_probabilities(x[0], d, epsilon), p)
    once = della_merged(x, density=d, epsilon=epsilon, generator=torch.Generator().manual_seed(1))
    kept = once != 0
    close(once[kept], (x[0].numpy() / p)[kept.numpy()])
    g = torch.Generator().manual_seed(2)
    share = torch.stack([della_merged(x, density=d, epsilon=epsilon, generator=g) != 0 for _ in range(500)]).double().mean(0)
    assert bool(((share - torch.from_numpy(p)).abs() < 5 * 0.5 / 500**0.5).all())


def test_della_of_a_convolution_ranks_all_of_one_output_and_of_a_scalar_takes_the_density() -> None:
    x = deltas(1, (4, 3, 2, 2))[0]
    torch.testing.assert_close(rank_probabilities(x, 0.5, 0.1).flatten(1), rank_probabilities(x.flatten(1), 0.5, 0.1))
    assert float(rank_probabilities(torch.tensor(2.0), 0.5, 0.1)) == 0.5


def test_breadcrumbs_leave_out_both_ends() -> None:
    x, density, gamma = deltas(2, (10, 10)), 0.6, 0.1
    kept = x.numpy().copy()
    for t in kept:
        order = np.argsort(np.abs(t).ravel())
        t.ravel()[order[:30]] = 0
        t.ravel()[order[90:]] = 0
    close(breadcrumbs_merged(x, density=density, gamma=gamma, scale=0.3), 0.3 * kept.sum(0))


@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_sce_selects_calculates_and_erases_at_any_size(size: float) -> None:
    x = size * deltas(3, (40,))
    a = x.numpy().copy()
    a[:, np.argsort(a.var(0))[: 40 - 12]] = 0
    energy = (a**2).sum(1)
    close(sce_merged(x, density=0.3) / size, disjoint_mean_by_energy(a, energy / energy.sum()) / size)


def disjoint_mean_by_energy(values: Array, weights: Array) -> Array:
    """The sign is elected by unweighted values here."""
    signs = np.where(values.sum(0) >= 0, 1, -1)
    mask = np.sign(values) == signs
    below = (weights[:, None] * mask).sum(0)
    return np.divide((weights[:, None] * mask * values).sum(0), below, out=np.zeros_like(below), where=below > 0)


def test_sce_lets_entries_go_in_which_models_agree() -> None:
    close(sce_merged(torch.tensor([[2.0, 1.0], [2.0, 3.0]]), density=0.5), np.zeros(2))  # one entry varies, and half of one is none


@pytest.mark.parametrize("m", [2, 3, 5])
def test_model_stock_is_the_point_nearest_to_the_centre_of_the_models(m: int) -> None:
    """The paper's geometry: base and models are in orthogonal directions from the centre of the shell, which the rule never sees."""
    rotation = np.linalg.qr(deltas(1, (m + 3, m + 3))[0].numpy())[0]
    centre, base, models = rotation[0], rotation[0] + 1.7 * rotation[1], rotation[0] + 0.6 * rotation[2 : m + 2]
    spanned = models - base  # the nearest point is sought in all of what the models span from the base
    nearest = base + np.linalg.lstsq(spanned.T, centre - base, rcond=None)[0] @ spanned
    close(torch.from_numpy(base) + model_stock_merged(torch.from_numpy(spanned)), nearest)


def test_model_stock_row_by_row() -> None:
    x = deltas(3, (5, 8))
    rows = torch.stack([model_stock_merged(x[:, i]) for i in range(5)])
    close(model_stock_merged(x, filter_wise=True), rows)
    assert float((rows - model_stock_merged(x)).abs().max()) > 1e-3


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_keeps_the_angle_proportional(t: float) -> None:
    a, b = torch.nn.functional.normalize(deltas(2, (50,)), dim=1)
    ours, omega = slerped(torch.stack([a, b]), t=t), math.acos(float(a @ b))
    assert float(ours.norm()) == pytest.approx(1)
    assert math.acos(float(ours @ a)) == pytest.approx(t * omega)
    assert math.acos(float(ours @ b)) == pytest.approx((1 - t) * omega)


def test_nuslerp_of_rows_is_slerp_of_each_and_a_base_shifts_the_origin() -> None:
    x, base = deltas(2, (4, 7)), deltas(1, (4, 7), 9)[0]
    w = torch.tensor([1.0, 3.0], dtype=x.dtype)
    close(nuslerped(x, w, dim=-1), torch.stack([slerped(x[:, i], t=0.75) for i in range(4)]))
    close(nuslerped(x, w, dim=0), torch.stack([slerped(x[:, :, i], t=0.75) for i in range(7)], 1))
    close(nuslerped(x + base, w, base), base + slerped(x, t=0.75))
    close(nuslerped(x), slerped(x))


def test_karcher_mean_balances_the_logarithms() -> None:
    x, w = deltas(4, (30,)), np.array([0.1, 0.4, 0.2, 0.3])
    ours = karcher_mean(x, torch.from_numpy(w), max_iter=200, tol=1e-12).numpy()
    norms = np.linalg.norm(x.numpy(), axis=1)
    assert np.linalg.norm(ours) == pytest.approx(w @ norms)
    mu, pull = ours / np.linalg.norm(ours), np.zeros(30)
    for weight, u in zip(w, x.numpy() / norms[:, None], strict=True):
        omega = math.acos(u @ mu)
        pull += weight * omega / math.sin(omega) * (u - math.cos(omega) * mu)
    assert np.linalg.norm(pull) < 1e-10


def test_karcher_and_multislerp_of_two_are_slerp_up_to_the_norm() -> None:
    x = torch.nn.functional.normalize(deltas(2, (30,)), dim=1)
    close(karcher_mean(x, max_iter=50, tol=1e-12), slerped(x), 1e-9)
    close(multislerped(x, eps=1e-15), slerped(x), 1e-9)


def test_karcher_leaves_zero_models_out_of_the_direction_only() -> None:
    x = torch.stack([torch.tensor([2.0, 0.0]), torch.zeros(2)])
    close(karcher_mean(x), np.array([1.0, 0.0]))
    close(karcher_mean(torch.zeros(2, 3)), np.zeros(3))
    small = 1e-7 * deltas(1, (3,)).repeat(2, 1)
    close(1e7 * karcher_mean(small), 1e7 * small[0])


def test_multislerp_of_opposites_is_linear_and_shifts_with_the_base() -> None:
    close(multislerped(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])), np.array([-1.0, 0.0]))
    x, base = deltas(3, (20,)), deltas(1, (20,), 9)[0]
    close(multislerped(x + base, base=base), base + multislerped(x))


def test_nearswap_interpolates_with_t_over_the_distance() -> None:
    x, t = deltas(1, (50,)), 0.4
    weight = np.minimum(1, t / np.abs(x[0].numpy()))
    close(near_swapped(x, t=t), weight * x[0].numpy())


def test_arcee_fusion_by_quartiles() -> None:
    model, base = deltas(2, (12, 10))
    a, b = model.numpy(), base.numpy()
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (a, b))
    score = np.abs(a - b) * (p * np.log(p / q)).sum(-1, keepdims=True)
    low, middle, high = np.quantile(score, [0.25, 0.5, 0.75], method="lower")
    taken = score >= middle + 1.5 * (high - low)
    assert 0 < taken.sum() < taken.size / 4
    close(arcee_fused(model[None], base), np.where(taken, a, b))


@pytest.mark.parametrize("r", [0.0, 0.5])
def test_ram_averages_shared_and_strengthens_unique_entries(r: float) -> None:
    x, epsilon, alpha = deltas(3, (60,)), 0.8, 0.9
    changed = np.abs(x.numpy()) > epsilon
    count, out = changed.sum(0), np.zeros(60)
    for i, own in enumerate(x.numpy()):
        rho = (changed[i] & (count > 1)).sum() / (changed[i] & (count == 1)).sum()
        for j in np.flatnonzero(changed[i]):
            out[j] += own[j] * (1 + r * min(rho, alpha)) if count[j] == 1 else own[j] / count[j]
    assert set(count) >= {0, 1, 2}
    close(ram_merged(x, epsilon=epsilon, r=r, alpha=alpha), out)


def test_ema_of_lae_and_of_mos() -> None:
    x = deltas(5, (8,))
    lae = x[0].numpy()
    for theta in x[1:].numpy():
        lae = 0.7 * lae + 0.3 * theta
    close(ema_merged(x, decay=0.7), lae)
    mos = [x[0].numpy()]
    for theta in x[1:].numpy():
        mos.append(0.9 * theta + 0.1 * np.mean(mos, axis=0))
    close(ema_merged(x, decay=0.1, before="mean"), mos[-1])


def test_interpolate_is_exact_at_both_ends() -> None:
    model, base = deltas(2).float()
    assert torch.equal(interpolated(model[None], base, alpha=0.0), base)
    assert torch.equal(interpolated(model[None], base, alpha=1.0), model)
    close(interpolated(model[None], base, alpha=0.3), 0.7 * base.numpy() + 0.3 * model.numpy(), 1e-6)
