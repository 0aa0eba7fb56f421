"""Rules that look at statistics or whole matrices against NumPy from the papers, with loops, and their properties."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import exapt
from exapt.algebra.rules.fisher import fisher_weighted
from exapt.algebra.rules.iso import isotropic, isotropic_with_specifics
from exapt.algebra.rules.pcb import competition_balanced
from exapt.algebra.rules.regmean import regression_mean
from exapt.algebra.rules.sens import sensitivity_guided, sensitivity_scaled
from exapt.algebra.rules.tsv import singular_vectors_merged
from exapt.algebra.rules.widen import disentangled
from exapt.algebra.rules.wudi import interference_minimised
from exapt.algebra.statistics import gram_matrices
from exapt.algebra.tensors import merge_tensors


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, expected: np.ndarray, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=rtol, atol=1e-12)


def polar(m: np.ndarray) -> np.ndarray:
    u, _, v = np.linalg.svd(m, full_matrices=False)
    return u @ v


# Fisher


@pytest.mark.parametrize("favour_first", [False, True])
def test_fisher_is_the_weighted_mean_of_every_entry(favour_first: bool) -> None:
    models, f, w = drawn(0, 3, 4, 2), drawn(1, 3, 4, 2).square(), [0.2, 1.0, 0.5]
    f[:, 0, 0] = 0
    f[1:, 1, 1] = 1e-9
    expected = np.zeros((4, 2))
    for a in range(4):
        for b in range(2):
            says = [max(float(f[i, a, b]), 1e-3 if i == 0 or not favour_first else 0.0) * w[i] for i in range(3)]
            expected[a, b] = sum(s * float(models[i, a, b]) for i, s in enumerate(says)) / sum(says)
    close(fisher_weighted(models, torch.tensor(w).double(), list(f), floor=1e-3, favour_first=favour_first), expected, 1e-6)
    if favour_first:
        assert expected[0, 0] == pytest.approx(float(models[0, 0, 0]))


def test_fisher_averages_tensors_that_have_none_and_refuses_nonsense() -> None:
    trees = [{"w": torch.tensor([1.0]), "running_mean": torch.tensor([1.0])}, {"w": torch.tensor([4.0]), "running_mean": torch.tensor([4.0])}]
    merged = merge_tensors("fisher", trees, statistics=[{"w": torch.tensor([2.0])}, {"w": torch.tensor([1.0])}])
    assert {k: float(v) for k, v in merged.items()} == {"w": 2.0, "running_mean": 2.5}
    wrong: dict[str, dict[str, Any]] = {
        "floor 0": dict(floor=0),
        "must not be negative": dict(statistics=[-torch.ones(1), torch.ones(1)]),
        "nor all weights zero": dict(statistics=[torch.ones(1)] * 2, weights=torch.zeros(2)),
        "its model's shape": dict(statistics=[torch.ones(2)] * 2),
    }
    for match, arguments in wrong.items():
        with pytest.raises(exapt.InputError, match=match):
            fisher_weighted(torch.ones(2, 1), **arguments)


# RegMean


def test_regmean_is_the_least_squares_fit_to_all_outputs() -> None:
    models, inputs, w = drawn(0, 3, 4, 5), [drawn(i, 20 + i, 5) for i in (1, 2, 3)], [1.0, 2.0, 0.5]
    rows = np.concatenate([np.sqrt(v / len(x)) * x.numpy() for x, v in zip(inputs, w, strict=True)])
    wanted = np.concatenate([np.sqrt(v / len(x)) * (x @ m.T).numpy() for x, m, v in zip(inputs, models, w, strict=True)])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    grams = [x.T @ x / len(x) for x in inputs]
    close(regression_mean(models, torch.tensor(w).double(), grams, shrink=1.0), expected, 1e-8)
    turned = regression_mean(models.mT, torch.tensor(w).double(), [{"transposed": g} for g in grams], shrink=1.0)
    close(turned, expected.T, 1e-8)


def test_regmean_shrinks_what_is_off_the_diagonal() -> None:
    models, grams = drawn(0, 2, 3, 4).numpy(), [x.T @ x for x in drawn(1, 2, 9, 4).numpy()]
    left, right = np.zeros((4, 4)), np.zeros((4, 3))
    for g, m in zip(grams, models, strict=True):
        shrunk = np.array([[g[a, b] * (1.0 if a == b else 0.7) for b in range(4)] for a in range(4)])
        left, right = left + shrunk, right + shrunk @ m.T
    close(regression_mean(torch.tensor(models), None, [torch.tensor(g) for g in grams], shrink=0.7), np.linalg.solve(left, right).T, 1e-8)


def test_regmean_leaves_inputs_that_are_always_zero_at_the_average() -> None:
    models, x = drawn(0, 2, 3, 4), drawn(1, 2, 20, 4)
    x[:, :, 2] = 0
    merged = regression_mean(models, None, [v.T @ v for v in x], shrink=0.9)
    live = [0, 1, 3]
    close(merged[:, 2], models[:, :, 2].mean(0).numpy())
    close(merged[:, live], regression_mean(models[:, :, live], None, [v[:, live].T @ v[:, live] for v in x]).numpy(), 1e-7)


def test_regmean_of_a_convolution_minimises_the_outputs_distance() -> None:
    convs = [nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=False).double() for _ in range(2)]
    x = [drawn(i, 6, 2, 5, 5) for i in (1, 2)]
    grams = [gram_matrices(c, [v], dtype=torch.float64)["weight"] for c, v in zip(convs, x, strict=True)]
    merged = regression_mean(torch.stack([c.weight.detach() for c in convs]), None, grams, shrink=1.0).requires_grad_()
    loss = sum((nn.functional.conv2d(v, merged, padding=1, stride=2) - c(v).detach()).square().sum() for c, v in zip(convs, x, strict=True))
    (gradient,) = torch.autograd.grad(loss, merged)
    assert float(loss.detach()) > 1
    assert float(gradient.abs().max()) < 1e-9 * float(loss.detach())


def test_regmean_averages_the_rest_and_refuses_nonsense() -> None:
    trees = [{"w": torch.ones(1, 1), "b": torch.ones(1)}, {"w": 4 * torch.ones(1, 1), "b": 4 * torch.ones(1)}]
    merged = merge_tensors("regmean", trees, weights=[1.0, 3.0], statistics=[{"w": torch.tensor([[2.0]])}, {"w": torch.tensor([[1.0]])}])
    assert float(merged["w"]) == pytest.approx((2 * 1 + 3 * 4) / 5)
    assert float(merged["b"]) == pytest.approx(13 / 4)
    wrong: dict[str, dict[str, Any]] = {
        "shrink 2": dict(shrink=2),
        "for 1 inputs": dict(statistics=[torch.eye(2)] * 2),
        "must not be negative": dict(statistics=[torch.eye(1)] * 2, weights=torch.tensor([2.0, -1.0])),
    }
    for match, arguments in wrong.items():
        with pytest.raises(exapt.InputError, match=match):
            regression_mean(torch.ones(2, 3, 1), **arguments)


# Whole matrices


def test_tsv_against_the_concatenation_of_the_paper() -> None:
    tau, m, r = drawn(0, 3, 8, 7).numpy(), 3, 7
    k = r // m
    u, s, v = np.zeros((8, r)), np.zeros(r), np.zeros((r, 7))
    for i in range(m):
        a, b, c = np.linalg.svd(tau[i], full_matrices=False)
        u[:, i * k : (i + 1) * k], s[i * k : (i + 1) * k], v[i * k : (i + 1) * k] = a[:, :k], b[:k], c[:k]
    expected = polar(u) @ np.diag(s) @ polar(v)
    close(singular_vectors_merged(torch.tensor(tau), scale=0.5), 0.5 * expected, 1e-8)
    assert torch.equal(singular_vectors_merged(torch.tensor(tau[0])), torch.tensor(tau[0]).mean(0))
    assert torch.equal(singular_vectors_merged(torch.tensor(tau), name="text_projection", exclude="text_proj"), torch.tensor(tau).mean(0))


def test_tsv_of_equal_task_vectors_is_their_truncation() -> None:
    tau = drawn(0, 6, 4)
    u, s, v = torch.linalg.svd(tau, full_matrices=False)
    close(singular_vectors_merged(torch.stack([tau, tau])), ((u[:, :2] * s[:2]) @ v[:2]).numpy(), 1e-8)


def test_iso_c_flattens_the_spectrum_of_the_sum() -> None:
    tau = drawn(0, 3, 5, 4)
    merged = isotropic(tau, scale=2.0)
    values = np.linalg.svd(merged.numpy(), compute_uv=False)
    np.testing.assert_allclose(values, 2 * np.linalg.svd(tau.sum(0).numpy(), compute_uv=False).mean() * np.ones(4))
    close(merged / values[0], polar(tau.sum(0).numpy()), 1e-8)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_against_the_paper(common: float) -> None:
    tau, m, r = drawn(0, 3, 9, 7).numpy(), 3, 7
    total = min(round((r - int(r * common)) / m), r // m) * m
    first, own = r - total, total // m
    u, s, v = np.linalg.svd(tau.sum(0), full_matrices=False)
    left, values, right = [u[:, :first]], [s[:first]], [v[:first]]
    for t in tau:
        a, b, c = np.linalg.svd(t - u[:, :first] @ u[:, :first].T @ t, full_matrices=False)
        left, values, right = [*left, a[:, :own]], [*values, b[:own]], [*right, c[:own]]
    expected = polar(np.concatenate(left, 1)) @ polar(np.concatenate(right)) * np.concatenate(values).mean()
    close(isotropic_with_specifics(torch.tensor(tau), common=common), expected, 1e-7)
    if common == 1.0:
        close(isotropic(torch.tensor(tau)), expected, 1e-7)


def test_iso_cts_refuses_a_share_above_one() -> None:
    with pytest.raises(exapt.InputError, match="common 2"):
        isotropic_with_specifics(torch.ones(2, 3, 3), common=2)


def test_wudi_takes_the_steps_of_adam_down_its_loss() -> None:
    tau = drawn(0, 3, 4, 5).numpy()

    def loss(t: np.ndarray) -> float:
        return sum(np.sum(((t - a) @ a.T) ** 2) / np.sum(a**2) for a in tau)

    x = tau.sum(0)
    first, second = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, 41):
        g = np.zeros_like(x)
        for a in tau:
            g += 2 * (x - a) @ a.T @ a / np.sum(a**2)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        x = x - 1e-2 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    merged = interference_minimised(torch.tensor(tau), steps=40, lr=1e-2)
    close(merged, x, 1e-7)
    assert loss(merged.numpy()) < 0.7 * loss(tau.sum(0))
    assert torch.equal(interference_minimised(torch.tensor(tau), steps=0), torch.tensor(tau).sum(0))
    with pytest.raises(exapt.InputError, match="steps -1"):
        interference_minimised(torch.tensor(tau), steps=-1)


def widen_by_hand(models: np.ndarray, base: np.ndarray, ratio: float, calibration: float | None) -> np.ndarray:
    m, columns = len(models), base.shape[1]
    scores = np.zeros((2, m, columns))
    for part in range(2):
        ranks = np.zeros((m, columns))
        for i in range(m):
            d = []
            for c in range(columns):
                a, b = models[i][:, c], base[:, c]
                d.append(abs(np.linalg.norm(a) - np.linalg.norm(b)) if part == 0 else 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            for place, c in enumerate(np.argsort(d, kind="stable")):
                ranks[i, c] = place / columns
        for i in range(m):
            for c in range(columns):
                scores[part, i, c] = np.exp(ranks[i, c]) / np.exp(ranks[:, c]).sum()
                if calibration is not None and ranks[i, c] > ratio * ranks[i].mean():
                    scores[part, i, c] = calibration
    return base + sum(scores.mean(0)[i] * (models[i] - base) for i in range(m))


@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (1.5, 0.8), (1.0, None)])
def test_widen_against_the_paper(ratio: float, calibration: float | None) -> None:
    base, deltas = drawn(0, 5, 6), 0.3 * drawn(1, 3, 5, 6)
    expected = widen_by_hand((base + deltas).numpy(), base.numpy(), ratio, calibration)
    close(base + disentangled(deltas, base, ratio=ratio, calibration=calibration), expected)
    turned = disentangled(deltas.mT, base.T, name="model.embed_tokens.weight", ratio=ratio, calibration=calibration)
    close(base.T + turned, expected.T)
    kernels = disentangled(deltas.reshape(3, 5, 3, 2), base.reshape(5, 3, 2), ratio=ratio, calibration=calibration)
    close(base + kernels.reshape(5, 6), expected)


def test_widen_of_a_vector_scores_its_entries() -> None:
    d = np.array([[1.0, 0.1], [0.5, -2.0]])
    e = np.exp(np.abs(d))
    scores = e / e.sum(0)
    for i in range(2):
        scores[i][np.abs(d[i]) > np.abs(d[i]).mean()] = 1.0
    close(disentangled(torch.tensor(d), torch.zeros(2)), (scores * d).sum(0))


def test_sens_softmax_of_the_scores_in_every_layer() -> None:
    deltas, alpha, tau = drawn(0, 3, 2, 2), [0.2, 0.9, 0.5], [0.5, 0.2, 0.3]
    e = np.exp(np.array(alpha) * np.array(tau) / 0.1)
    expected = 0.4 * 3 * sum(e[i] / e.sum() * deltas[i].numpy() for i in range(3))
    statistics = [torch.tensor(a).double() for a in alpha]
    close(sensitivity_guided(deltas, torch.tensor(tau).double(), statistics, temperature=0.1, scale=0.4), expected, 1e-6)
    base, models = {"w": torch.zeros(2, 2).double(), "n": torch.tensor(3)}, [{"w": d, "n": torch.tensor(3)} for d in deltas]
    scaled = sensitivity_scaled(models, base, [{"w": a} for a in statistics], tau, temperature=0.1)
    merged = merge_tensors("task_arithmetic", scaled, base, scale=0.4)
    close(merged["w"], expected, 1e-6)
    assert int(merged["n"]) == 3
    close(sensitivity_guided(deltas), deltas.sum(0).numpy())


def test_sens_refuses_nonsense() -> None:
    with pytest.raises(exapt.InputError, match="temperature 0"):
        sensitivity_guided(torch.ones(2, 1), temperature=0)
    with pytest.raises(exapt.InputError, match="one number a model"):
        sensitivity_guided(torch.ones(2, 1), statistics=[torch.ones(2), torch.ones(2)])


# PCB, over whole models


def pcb_by_hand(tau: np.ndarray, density: float, clip: float, pairs: bool) -> np.ndarray:
    m, n = tau.shape

    def ranged(row: np.ndarray) -> np.ndarray:
        return (row - row.min()) / (row.max() - row.min())

    size = np.zeros_like(tau)
    for i in range(m):
        order = np.sort(np.abs(tau[i]))
        size[i] = np.clip(np.abs(tau[i]), order[int(n * clip)], order[int(n * (1 - clip) - 1)])
    top, bottom = np.zeros(n), np.zeros(n)
    for i in range(m):
        intra = np.exp(m * ranged(size[i]) ** 2)
        inter = np.zeros(n)
        if pairs:
            for j in range(m):
                inter += np.tanh(np.sign(tau[i]) * ranged(size[i]) * np.sign(tau[j]) * ranged(size[j]))
        else:
            inter = np.tanh(tau[i] * tau.sum(0))
        beta = intra * inter
        beta = ranged(np.maximum(beta, np.sort(beta)[int(n * (1 - density))]))
        top, bottom = top + beta * np.sign(tau[i]) * size[i], bottom + beta
    return top / np.maximum(bottom, 1e-12)


@pytest.mark.parametrize(("inter", "clip", "density"), [("sum", 1e-4, 0.1), ("sum", 0.05, 0.5), ("pairs", 0.01, 0.2)])
def test_pcb_competes_over_the_whole_model(inter: str, clip: float, density: float) -> None:
    base = {"a": drawn(0, 5, 4), "step": torch.tensor(7), "b": drawn(1, 11)}
    models = [{"a": base["a"] + drawn(i, 5, 4), "step": torch.tensor(7), "b": base["b"] + 3 * drawn(i + 9, 11)} for i in (2, 3, 4)]
    tau = np.stack([np.concatenate([(m[k] - base[k]).numpy().ravel() for k in ("a", "b")]) for m in models])
    expected = 0.8 * pcb_by_hand(tau, density, clip, inter == "pairs")
    merged = competition_balanced(models, base, density=density, clip=clip, inter=inter, scale=0.8)  # type: ignore[arg-type]
    assert list(merged) == list(base)
    assert int(merged["step"]) == 7
    close(merged["a"] - base["a"], expected[:20].reshape(5, 4), 1e-8)
    close(merged["b"] - base["b"], expected[20:], 1e-8)


def test_pcb_is_not_what_it_would_be_tensor_by_tensor() -> None:
    base = {"a": torch.zeros(10), "b": torch.zeros(10)}
    models = [{"a": torch.rand(10), "b": 10 + torch.rand(10)} for _ in range(2)]
    merged = competition_balanced(models, base, density=0.5)
    assert not merged["a"].any()
    assert int((merged["b"] > 0).sum()) > 5


def test_pcb_refuses_nonsense_and_says_which_model() -> None:
    base, good = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    with pytest.raises(exapt.InputError, match="density 0"):
        competition_balanced([good], base, density=0)
    with pytest.raises(exapt.InputError, match="w: bad holds NaN"):
        competition_balanced([good, {"w": torch.full((3,), torch.nan)}], base, names=["good", "bad"])
    with pytest.raises(exapt.InputError, match="lacks w"):
        competition_balanced([{"v": torch.ones(3)}], base)
    assert torch.equal(competition_balanced([base, base], base)["w"], base["w"])
    assert int(competition_balanced([{"n": torch.tensor(2)}], {"n": torch.tensor(2)})["n"]) == 2


# Properties

RULES: dict[str, Callable[..., Tensor]] = {
    "fisher": lambda d, base, s: fisher_weighted(base + d, statistics=[v.square()[0] for v in s]) - base,
    "regmean": lambda d, base, s: regression_mean(base + d, statistics=[v.flatten(0, 1).T @ v.flatten(0, 1) for v in s]) - base,
    "widen": lambda d, base, s: disentangled(d, base, calibration=None),
    "tsv": lambda d, base, s: singular_vectors_merged(d),
    "iso_c": lambda d, base, s: isotropic(d),
    "iso_cts": lambda d, base, s: isotropic_with_specifics(d),
    "wudi": lambda d, base, s: interference_minimised(d, steps=3),
    "sens_merging": lambda d, base, s: sensitivity_guided(d, statistics=[v.abs().mean() for v in s]),
    "pcb": lambda d, base, s: competition_balanced([{"w": base + x} for x in d], {"w": base}, density=0.6, clip=0)["w"] - base,
}


@pytest.mark.parametrize("key", RULES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(2, 4))
def test_the_order_of_models_does_not_matter(key: str, seed: int, m: int) -> None:
    deltas, base, s = drawn(seed, m, 6, 5), drawn(seed + 1, 6, 5), drawn(seed + 2, m, 6, 6, 5)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(RULES[key](deltas, base, s), RULES[key](deltas[order], base, s[order]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("key", ["fisher", "regmean", "widen"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(1, 4))
def test_merging_identical_models_changes_nothing(key: str, seed: int, m: int) -> None:
    delta, base, s = drawn(seed, 6, 5), drawn(seed + 1, 6, 5), drawn(seed + 2, m, 6, 6, 5)
    torch.testing.assert_close(RULES[key](delta.expand(m, 6, 5), base, s), delta, rtol=1e-8, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(1, 4))
def test_pcb_of_identical_models_keeps_what_it_does_not_drop(seed: int, m: int) -> None:
    delta = drawn(seed, 40)
    merged = competition_balanced([{"w": delta}] * m, {"w": torch.zeros(40).double()}, density=0.5, clip=0)["w"]
    kept = merged != 0
    assert int(kept.sum()) == 19
    assert float(delta[kept].abs().min()) > float(delta[~kept].abs().max())
    torch.testing.assert_close(merged[kept], delta[kept])


@pytest.mark.parametrize("key", ["tsv", "iso_c", "iso_cts", "sens_merging"])
def test_scale_zero_gives_the_base_bit_for_bit(key: str) -> None:
    base = {"w": torch.randn(4, 3), "b": torch.randn(4)}
    merged = merge_tensors(key, [{k: t + 1 for k, t in base.items()}] * 2, base, scale=0.0)
    assert all(torch.equal(merged[k], base[k]) for k in base)


def test_one_model_alone_is_itself_for_tsv_and_wudi() -> None:
    tau = drawn(0, 1, 6, 5)
    close(singular_vectors_merged(tau), tau[0].numpy(), 1e-8)
    close(interference_minimised(tau), tau[0].numpy())
