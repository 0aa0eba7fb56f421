"""Rules on parts of tensors: as on whole ones, whatever the parts are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

import exapt
from exapt.algebra.files import merge_files
from exapt.algebra.rule import rule_of
from exapt.algebra.sparsify import band, largest, smallest, sparsified, without_outliers
from exapt.algebra.streamed import banded, cuts, generators, in_parts, sparse
from exapt.algebra.tensors import merge_tensors
from exapt.core.components import components

few = settings(max_examples=40, deadline=None)
SHAPES = [(1,), (7,), (40,), (3, 5), (6, 9), (2, 3, 4), ()]
STREAMED: list[tuple[str, dict[str, Any]]] = [
    ("ties", {}), ("ties", {"density": 0.6, "consensus": "count", "normalise": False, "scale": 0.5}), ("ties", {"density": 0.5, "rescale": "l1"}),
    ("ties", {"density": 0.0}), ("ties", {"density": 1.0}), ("breadcrumbs", {"density": 0.5, "gamma": 0.2}), ("breadcrumbs", {"density": 0.9, "gamma": 0.3}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1, "rescale": "l1", "consensus": "sum"}), ("dare", {}), ("dare", {"density": 0.3, "consensus": "sum"}),
    ("dare", {"density": 0.3, "rescale": "l1"}), ("della", {}), ("della", {"density": 0.3, "epsilon": 0.1, "rescale": "l1"}), ("sce", {}),
    ("sce", {"density": 0.4}), ("sce", {"density": 0.0, "floor": 1e-6}), ("ram", {"epsilon": 0.3, "r": 0.5, "alpha": 2.0}), ("sens_merging", {"scale": 0.4}),
    ("model_stock", {}), ("model_stock", {"filter_wise": True}), ("karcher", {}), ("multislerp", {}), ("multislerp", {"normalise": False}),
    ("slerp", {"t": 0.3}), ("nuslerp", {}), ("nuslerp", {"dim": -1}), ("nuslerp", {"dim": 0}),
    ("widen", {}), ("widen", {"calibration": None}),
]  # fmt: skip
WHOLE = {"arcee_fusion", "core_space", "iso_c", "iso_cts", "knots", "regmean", "tsv", "wudi"}
"""Decompositions of matrices, inverses, steps of an optimiser, and a rule for one model: named in the docstring of :func:`merge_files`."""


@st.composite
def tensors(draw: st.DrawFn, models: int | None = None) -> Tensor:
    """(m, ...) of small whole numbers over 4, so that there are equal sizes and zeros, or of continuous ones."""
    shape = (models or draw(st.integers(2, 4)), *draw(st.sampled_from(SHAPES)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return (torch.randint(-4, 5, shape, generator=g) / 4 if draw(st.booleans()) else torch.randn(shape, generator=g)).to(dtype)


def streamed(x: Tensor, rule: str, config: dict[str, Any], block: int, weights: Tensor | None, base: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """A rule on parts, and on the whole."""
    found = rule_of(rule)
    assert found.streamed is not None
    given: dict[str, Any] = {"weights": weights, "name": "embed.weight", "statistics": None}

    def more(skipped: str = "") -> dict[str, Any]:
        drawn = given | {"generator": torch.Generator().manual_seed(3), "base": base}
        return {k: drawn[k] for k in found.given if k != skipped} | found.checked(config)

    expected = found.function(x, **more())
    parts = found.streamed(in_parts(x, base, block=block), **more("base"))
    return None if parts is None else torch.cat([p.reshape(-1) for p in parts]).reshape(x.shape[1:]), expected


@pytest.mark.parametrize(("rule", "config"), STREAMED)
@few
@given(x=tensors(4), block=st.integers(1, 120), weighted=st.booleans())
def test_as_on_the_whole(rule: str, config: dict[str, Any], x: Tensor, block: int, weighted: bool) -> None:
    found = rule_of(rule)
    x, base = x[:-1], x[-1]
    x = x[: 2 if "slerp" in rule and rule != "multislerp" else 3]
    weights = torch.tensor([0.7, 1.3, 0.4][: len(x)], dtype=x.dtype) if weighted and "weights" in found.given else None
    if rule == "multislerp" and not bool(x.any()):
        x = x + 1
    ours, expected = streamed(x, rule, config, block, weights, base if "base" in found.given else None)
    if ours is None:
        assert config.get("dim") == 0
        assert x.ndim > 2
        return
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=2e-6)


@few
@given(x=tensors(), block=st.integers(1, 60), a=st.integers(-1, 60), b=st.integers(-1, 60))
def test_cuts_mark_what_smallest_marks(x: Tensor, block: int, a: int, b: int) -> None:
    n = x[0].numel()
    parts = in_parts(x, block=block)
    counts = [[(c + i) % (n + 2) for i in range(len(x))] for c in (a, b)]
    for cut, wanted in zip(cuts(lambda: (p.abs() for p in parts), counts, n), counts, strict=True):
        mark = cut.marker()
        pieces = [torch.stack([mark(i, row) for i, row in enumerate(p.abs())]) for p in parts]
        expected = torch.stack([smallest(row, c).flatten() for row, c in zip(x, wanted, strict=True)])
        assert torch.equal(torch.cat(pieces, 1), expected)


@few
@given(x=tensors(), block=st.integers(1, 60), density=st.floats(0, 1), gamma=st.floats(0, 1))
def test_sparsified_in_parts_bit_for_bit(x: Tensor, block: int, density: float, gamma: float) -> None:
    shares = [density] * len(x)
    masks: dict[Callable[[int, float], tuple[int, int]], Callable[[Tensor, float], tuple[Tensor, float]]] = {
        lambda n, d: (n - max(int(d * n), 1), n): lambda t, d: (largest(t, d), d),
        lambda n, d: band(n, d, gamma): lambda t, d: (without_outliers(t, d, gamma), d),
    }
    for limits, mask in masks.items():
        parts = in_parts(x, block=block)
        ours = torch.cat(list(sparse(lambda parts=parts: parts, shares, banded(parts, shares, limits))), 1)  # type: ignore[misc]
        assert torch.equal(ours.reshape(x.shape), sparsified(x, density, mask))


@few
@given(count=st.integers(1, 3000), shares=st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=1, max_size=4))
def test_draws_are_one_models_after_the_others(count: int, shares: list[float]) -> None:
    one = torch.Generator().manual_seed(1)
    drawing = [i for i, s in enumerate(shares) if 0 < s < 1]
    expected = {i: torch.rand(count, generator=one) for i in drawing}
    begin = generators(torch.Generator().manual_seed(1), shares, count)
    for _ in range(2):
        found = begin()
        assert list(found) == drawing
        for i, g in found.items():
            assert torch.equal(torch.cat([torch.rand(k, generator=g) for k in (count // 2, count - count // 2)]), expected[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_files_as_in_memory(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed draws the same masks too, wherever tensors are cut."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    shapes = {"embed.weight": (30, 8), "b": (50,), "c": (4, 3, 5)}
    trees = [{n: torch.randn(s, generator=torch.Generator().manual_seed(10 * i + j)).to(dtype) for j, (n, s) in enumerate(shapes.items())} for i in range(4)]
    for i, t in enumerate(trees):
        save_file(t, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    rtol = 1e-6 if dtype == torch.float32 else 2**-7  # one step of bfloat16
    for rule, config in STREAMED:
        models = slice(1, 3 if "slerp" in rule and rule != "multislerp" else 4)
        expected = merge_tensors(rule, trees[models], trees[0], seed=4, **config)
        for block in (31, 100):
            monkeypatch.setattr("exapt.algebra.plan.BLOCK", block)
            merge_files(rule, paths[models], tmp_path / "out.safetensors", base=paths[0], seed=4, overwrite=True, **config)
            made = load_file(tmp_path / "out.safetensors")
            for name, tensor in expected.items():
                torch.testing.assert_close(made[name], tensor, rtol=rtol, atol=2e-6, msg=f"{rule} {config} {name} {block}")


def test_nan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exapt.algebra.plan.BLOCK", 12)
    for i in range(3):
        save_file({"w": torch.randn(20).index_fill(0, torch.tensor([17]), float("nan") if i == 2 else 0.0)}, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    with pytest.raises(exapt.InputError, match=r"w: .*2\.safetensors holds NaN or infinity"):
        merge_files("ties", paths[1:], tmp_path / "out", base=paths[0])
    with pytest.raises(exapt.InputError, match=r"w: the base holds NaN or infinity"):
        merge_files("ties", paths[:2], tmp_path / "out", base=paths[2])
    assert not (tmp_path / "out").exists()


def test_every_rule_says_how_it_is_read() -> None:
    rules = {k: rule_of(k) for k in components("merge rule") if str(components("merge rule")[k].target.__module__).startswith("exapt.")}
    assert {k for k, r in rules.items() if not r.entrywise and r.streamed is None} == WHOLE
    assert {k for k, r in rules.items() if r.streamed is not None} == {k for k, _ in STREAMED}
    assert all(k in inspect.getdoc(merge_files) for k in WHOLE)  # type: ignore[operator]
