"""Codecs of tensors: each against NumPy from its paper, and within its error bound on random trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

import exapt
from exapt.algebra.compress.bitdelta import BitDelta, distil
from exapt.algebra.compress.bits import golomb, pack, positions_of, unpack
from exapt.algebra.compress.codec import Codec, as_settings, codec, codecs, shapes_of
from exapt.algebra.compress.compeft import ComPEFT
from exapt.algebra.compress.precision import PrecisionCodebook
from exapt.algebra.compress.uniform import UniformGroups

VARIANTS: list[Codec] = [
    codec("cast", dtype="float16"), codec("cast"), codec("cast", dtype="float32"), codec("bitdelta"), codec("compeft"), codec("compeft", density=1.0),
    codec("compeft", density=0.3, alpha=2.0, per="tensor"), codec("precision_codebook"), codec("precision_codebook", bits=3),
    codec("uniform_groups"), codec("uniform_groups", bits=1, group=5), codec("uniform_groups", bits=8, group=7),
]  # fmt: skip


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Tensor]:
    """Up to four tensors of any small shape: normal, of any scale and offset, constant, or with extreme values."""
    found = {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        t = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-6, 3)) + draw(st.sampled_from([0.0, 1.0, -30.0]))
        kind = draw(st.sampled_from(["normal", "constant", "outlier"]))
        if kind == "constant":
            t = torch.full(shape, float(t.flatten()[0]))
        elif kind == "outlier":
            t.view(-1)[0] = 1000.0
        found[f"t{i}"] = t
    return found


@pytest.mark.parametrize("made", VARIANTS, ids=str)
@given(trees())
@settings(max_examples=40, deadline=None)
def test_error_is_within_the_bound(made: Codec, tree: dict[str, Tensor]) -> None:
    decoded, bounds = made.decode(made.encode(tree), shapes_of(tree)), made.bound(tree)
    assert list(decoded) == list(tree)
    for k, t in tree.items():
        assert decoded[k].shape == t.shape
        error, rounding = float((decoded[k].double() - t.double()).norm()), 1e-6 * (1 + float(t.double().norm()))
        assert error <= bounds[k] * (1 + 1e-5) + rounding, k


@given(st.sets(st.integers(0, 5000)), st.sampled_from([1, 1000]))
def test_golomb_codes_are_exact(chosen: set[int], factor: int) -> None:
    positions = torch.tensor(sorted(chosen), dtype=torch.int64) * factor
    assert torch.equal(positions_of(golomb(positions)), positions)


@given(st.integers(1, 20), st.data())
def test_packing_is_exact(width: int, data: st.DataObject) -> None:
    values = torch.tensor(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=50)), dtype=torch.int64)
    stream = pack(values, width)
    assert stream.numel() == -(-len(values) * width // 8)
    assert torch.equal(unpack(stream, width, len(values)), values)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.2])
def test_golomb_is_close_to_the_entropy(p: float) -> None:
    n = 100_000
    chosen = np.flatnonzero(np.random.default_rng(0).random(n) < p)
    coded, p = golomb(torch.from_numpy(chosen)), len(chosen) / n
    bits = 8 * (coded["unary"].numel() + coded["rest"].numel())
    entropy = n * (-p * np.log2(p) - (1 - p) * np.log2(1 - p))
    b = 1 + np.floor(np.log2(np.log((np.sqrt(5) - 1) / 2) / np.log(1 - p)))  # Sattler et al. 2020, as ComPEFT cites it
    expected = n * p * (b + 1 / (1 - (1 - p) ** (2**b)))
    assert entropy < bits < 1.06 * entropy
    assert bits < 1.02 * expected


def test_positions_must_increase() -> None:
    with pytest.raises(exapt.InputError, match="increasing positions"):
        golomb(torch.tensor([3, 3]))
    coded = golomb(torch.tensor([3, 400]))
    with pytest.raises(exapt.InputError, match="holds 2 of 5"):
        positions_of({**coded, "golomb": torch.tensor([5, 1])})
    with pytest.raises(exapt.InputError, match="does not hold 9 numbers"):
        unpack(torch.zeros(2, dtype=torch.uint8), 2, 9)


def test_compeft_against_its_formula() -> None:
    rng = np.random.default_rng(0)
    a, l = rng.normal(0, 0.02, (8, 30)).astype(np.float32), (1 + rng.normal(0, 0.1, 40)).astype(np.float32)
    tree = {"A": torch.from_numpy(a), "l": torch.from_numpy(l)}
    tau = np.concatenate([a.ravel(), l - 1])  # what starts at 1 (IA3) is taken from 1
    k = int(0.1 * tau.size)
    threshold = np.sort(np.abs(tau))[-k]
    kept = np.abs(tau) >= threshold
    for alpha in (None, 2.0):
        scale = np.abs(tau[kept]).mean() if alpha is None else alpha * tau.std(ddof=1)
        expected = scale * np.sign(tau) * kept + np.concatenate([np.zeros(a.size), np.ones(40)])
        made = ComPEFT(density=0.1, alpha=alpha)
        found = made.decode(made.encode(tree), shapes_of(tree))
        np.testing.assert_allclose(np.concatenate([found["A"].numpy().ravel(), found["l"].numpy()]), expected, rtol=2e-6, atol=1e-7)


def test_compeft_with_the_mean_has_the_least_error_of_all_alphas() -> None:
    tree = {"A": torch.randn(50, 20)}
    best = ComPEFT(density=0.2).bound(tree)["A"]
    assert best <= float(tree["A"].norm())
    assert all(best <= ComPEFT(density=0.2, alpha=a).bound(tree)["A"] for a in (0.5, 1.0, 1.5, 2.0, 4.0))


def test_compeft_per_tensor_keeps_the_same_share_of_each() -> None:
    tree = {"A": torch.randn(100), "B": 1e-3 * torch.randn(100)}
    for per, shares in (("adapter", (20, 0)), ("tensor", (10, 10))):
        made = ComPEFT(density=0.1, per=per)  # type: ignore[arg-type]
        found = made.decode(made.encode(tree), shapes_of(tree))
        assert tuple(int((t != 0).sum()) for t in found.values()) == shares


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_precision_codebook_against_the_authors_iteration(bits: int) -> None:
    values = np.linspace(-1, 1, 2**bits)
    for _ in range(3000):  # medians of the cells between half-way points
        ends = norm.cdf((values[1:] + values[:-1]) / 2)
        shares = np.concatenate([[0.0], ends, [1.0]])
        values = norm.ppf((shares[1:] + shares[:-1]) / 2)
    w = np.random.default_rng(1).normal(0.1, 0.02, (40, 30)).astype(np.float32)
    z = (w - w.mean()) / w.std(ddof=1)
    expected = w.mean() + w.std(ddof=1) * values[np.abs(z[..., None] - values).argmin(-1)]
    made, tree = PrecisionCodebook(bits=bits), {"A": torch.from_numpy(w)}
    packed = made.encode(tree)
    np.testing.assert_allclose(made.decode(packed, shapes_of(tree))["A"].numpy(), expected, rtol=1e-4)
    assert packed["codes"].numel() == w.size * bits // 8


def test_precision_codebook_has_less_absolute_error_on_a_normal_tensor_than_even_steps() -> None:
    tree = {"A": torch.randn(200, 50)}
    for bits in (2, 3, 4):
        errors = [
            float((c.decode(c.encode(tree), shapes_of(tree))["A"] - tree["A"]).abs().mean()) for c in (PrecisionCodebook(bits), UniformGroups(bits, 10_000))
        ]
        assert errors[0] < errors[1]


def test_bitdelta_against_its_formula() -> None:
    delta = np.random.default_rng(2).normal(0, 0.01, (16, 24)).astype(np.float32)
    made, tree = BitDelta(), {"W": torch.from_numpy(delta)}
    packed = made.encode(tree)
    np.testing.assert_allclose(made.decode(packed, shapes_of(tree))["W"].numpy(), np.abs(delta).mean() * np.where(delta < 0, -1, 1), rtol=1e-6)
    assert packed["signs"].numel() == delta.size // 8


def test_scale_distillation_fits_the_outputs() -> None:
    layer, x = torch.randn(6, 10), torch.randn(64, 10) * torch.linspace(0.1, 3, 10)
    tree = {"W": 0.1 * torch.randn(6, 10), "V": 0.1 * torch.randn(6, 10)}

    def loss(d: dict[str, Tensor]) -> Tensor:
        return sum(((x @ (layer + tree[k]).T - x @ (layer + d[k]).T).square().mean() for k in tree), torch.zeros(()))

    made, shapes = BitDelta(), shapes_of(tree)
    fitted = distil(tree, loss, steps=400, lr=1e-3)
    for i, k in enumerate(tree):  # least squares of the outputs on those of the signs
        target, signs = (x @ tree[k].T).flatten(), (x @ (2.0 * (tree[k] >= 0) - 1).T).flatten()
        assert float(fitted["scale"][i]) == pytest.approx(float(target @ signs / signs.square().sum()), rel=1e-3)
    assert float(loss(made.decode(fitted, shapes))) < float(loss(made.decode(made.encode(tree), shapes)))
    with pytest.raises(exapt.InputError, match="the loss is nan at step 0"):
        distil(tree, lambda d: d["W"].sum() * float("nan"), steps=1)


def test_uniform_groups_against_numpy() -> None:
    w = np.random.default_rng(3).normal(0, 1, (3, 50)).astype(np.float32)
    made, tree = UniformGroups(bits=3, group=64), {"A": torch.from_numpy(w)}
    packed = made.encode(tree)
    low, step = packed["low"].float().numpy(), packed["step"].float().numpy()
    for g, start in enumerate(range(0, 150, 64)):
        part = w.ravel()[start : start + 64]
        assert low[g] <= part.min() < low[g] + 0.02 * abs(part.min())
        assert part.max() <= low[g] + 7 * step[g] + 1e-6 < part.max() + 0.02 * np.ptp(part)
        expected = low[g] + step[g] * np.clip(np.round((part - low[g]) / step[g]), 0, 7)
        np.testing.assert_allclose(made.decode(packed, shapes_of(tree))["A"].numpy().ravel()[start : start + 64], expected, rtol=1e-6, atol=1e-6)


def test_settings_are_checked() -> None:
    for key, given_, said in (
        ("compeft", {"density": 0.0}, "density is 0.0"), ("compeft", {"alpha": -1.0}, "alpha is -1.0"), ("compeft", {"densty": 0.1}, 'did you mean "density"'),
        ("compeft", {"per": "site"}, "one of 'adapter', 'tensor'"),
        ("uniform_groups", {"bits": 9}, "from 1 to 8"), ("uniform_groups", {"group": 1}, "at least 2"),
        ("precision_codebook", {"bits": 0}, "from 1 to 8"), ("cast", {"dtype": "int8"}, "must be one of"), ("compft", {}, 'did you mean "compeft"'),
    ):  # fmt: skip
        with pytest.raises(exapt.InputError, match=said):
            codec(key, **given_)
    with pytest.raises(exapt.InputError, match="beyond the range of float16"):
        codec("cast", dtype="float16").encode({"A": torch.tensor([1e6, 1.0])})


def test_settings_come_back_from_json() -> None:
    for made in VARIANTS:
        noted = as_settings(made)
        assert codec(noted.pop("codec"), **noted) == made
    assert {type(v) for v in VARIANTS} == set(codecs().values())
