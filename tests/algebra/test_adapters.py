"""Adapters merged, added and compared as what they add to the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import exapt
from exapt.algebra.adapters import Shifts, as_file, combined, shifts_of, shifts_on
from exapt.algebra.arithmetic import arithmetic, linear_form
from exapt.algebra.difference import difference, draw
from exapt.algebra.lowrank import LowRank
from exapt.core.file import read, write
from exapt.core.merge import new_values


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


def saved(folder: Path, name: str, method: exapt.Method, seed: int, where: str = "all") -> Path:
    """An adapter whose tensors are random."""
    model = exapt.attach(net(), method, where)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + (1.0 if method.key == "ia3" else 0.0))
    return exapt.save(model, folder / name)


def weights(path: Path) -> list[Tensor]:
    """The weights that an adapter makes of the base's."""
    model = exapt.merge(exapt.load(net(), path))
    return [model[0].weight.detach(), model[2].weight.detach()]


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(9))


def test_any_methods_and_ranks_average_as_their_weights_do(tmp_path: Path) -> None:
    methods = [exapt.LoRA(rank=2), exapt.LoRA(rank=3, alpha=4.0), exapt.LoHa(rank=2), exapt.Delta()]
    paths = [saved(tmp_path, f"a{i}", m, i) for i, m in enumerate(methods)]
    items = [shifts_of(read(p), p.stem) for p in paths]
    found, errors = as_file(combined("average", items, [1, 2, 3, 4]))
    merged = weights(write(found, tmp_path / "merged"))
    for k in range(2):
        torch.testing.assert_close(merged[k], sum(w * weights(p)[k] for w, p in zip((0.1, 0.2, 0.3, 0.4), paths, strict=True)), rtol=1e-5, atol=1e-6)
    assert set(errors.values()) == {0.0}


def test_low_rank_sums_stay_low_rank_and_exact(tmp_path: Path) -> None:
    paths = [saved(tmp_path, f"a{i}", exapt.LoRA(rank=r), i) for i, r in enumerate((1, 2))]
    items = {n: shifts_of(read(p), n) for n, p in zip("AB", paths, strict=True)}
    found = arithmetic("A - 0.5*B", items)
    assert all(isinstance(m, LowRank) and m.rank == 3 for m in found.matrices.values())
    file, _ = as_file(found)
    assert [r["method"]["method"] for r in file.rules] == ["lora"]
    out = exapt.load(net(), write(file, tmp_path / "c"))
    first, second = (w for w in (weights(paths[0])[0], weights(paths[1])[0]))
    base = net()[0].weight
    torch.testing.assert_close(exapt.merge(out)[0].weight, base + (first - base) - 0.5 * (second - base), rtol=1e-5, atol=1e-6)
    cut, errors = as_file(found, rank=1)
    for site, m in found.matrices.items():
        s = np.linalg.svd(found.dense(site).double().numpy(), compute_uv=False)
        assert errors[site] == pytest.approx(np.sqrt((s[1:] ** 2).sum() / (s**2).sum()), rel=1e-4), m
    assert {r["method"]["rank"] for r in cut.rules} == {1}


def test_shifts_that_depend_on_the_base_are_taken_from_it(tmp_path: Path) -> None:
    path = saved(tmp_path, "ia3", exapt.IA3(), 1)
    with pytest.raises(exapt.InputError, match="depends on the base's weights or biases; give the base"):
        shifts_of(read(path), "ia3")
    model = net()
    found = shifts_of(read(path), "ia3", model)
    assert not exapt.adapters(model)
    merged = exapt.merge(exapt.load(net(), path))
    torch.testing.assert_close(net()[0].weight + found.dense("0"), merged[0].weight)
    again = exapt.merge(exapt.load(net(), write(as_file(found)[0], tmp_path / "again")))
    torch.testing.assert_close(again(X), merged(X))


def test_task_arithmetic_of_zero_gives_the_base(tmp_path: Path) -> None:
    paths = [saved(tmp_path, f"a{i}", exapt.LoRA(rank=2), i) for i in range(2)]
    items = [shifts_of(read(p), p.stem) for p in paths]
    file, _ = as_file(combined("task_arithmetic", items, [0.0, 0.0]))
    assert torch.equal(weights(write(file, tmp_path / "none"))[0], net()[0].weight)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.floats(-2, 2), min_size=2, max_size=3))
def test_sums_of_factors_are_sums_of_matrices(seed: int, factors: list[float]) -> None:
    g = torch.Generator().manual_seed(seed)
    items = [Shifts(str(i), {"w": LowRank(torch.randn(4, 1 + i, generator=g), torch.randn(1 + i, 3, generator=g))}, "f", "Net") for i in range(len(factors))]
    found = combined("task_arithmetic", items, factors)
    dense = sum(f * x.dense("w") for f, x in zip(factors, items, strict=True))
    torch.testing.assert_close(found.dense("w"), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["knots", "core_space"])
def test_rules_that_have_a_form_on_factors_get_them(rule: str) -> None:
    g = torch.Generator().manual_seed(0)
    items = [Shifts(str(i), {"w": LowRank(torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g))}, "f", "Net") for i in range(2)]
    found = combined(rule, items, inner="task_arithmetic", settings={"scale": 0.5}).matrices["w"]
    assert isinstance(found, LowRank)
    torch.testing.assert_close(found.dense(), 0.5 * (items[0].dense("w") + items[1].dense("w")), rtol=1e-4, atol=1e-5)


def test_difference_is_numpys() -> None:
    a, b = np.array([[1.0, 0.0], [0.0, -2.0]]), np.array([[1.0, 3.0], [0.0, 2.0]])
    r = difference(*(Shifts("x", {"w": torch.tensor(m).float()}, "f", "Net") for m in (a, b)))[0]
    assert r["norm_a"] == pytest.approx(np.linalg.norm(a))
    assert r["angle"] == pytest.approx(np.degrees(np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))))
    p = np.array([2, 1]) / 3
    assert r["rank_a"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert r["conflict"] == 0.5
    assert r["distance"] == pytest.approx(np.linalg.norm(a - b))


def test_the_picture(tmp_path: Path) -> None:
    records = difference(*(Shifts("x", {"w": torch.eye(3) * i}, "f", "Net") for i in (1, 2)))
    assert draw(records, tmp_path / "d.png", ("a", "b")).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(exapt.InputError, match="xyz"):
        draw(records, tmp_path / "d.xyz", ("a", "b"))


@pytest.mark.parametrize(
    ("text", "said"),
    [("A * B", "not a sum of multiples"), ("A + 1", "adds the number 1"), ("A +", "no expression"), ("A(1)", "not a sum"), ("A / 0", "not a sum")],
)
def test_expressions_that_are_none(text: str, said: str) -> None:
    with pytest.raises(exapt.InputError, match=said):
        linear_form(text)


def test_bad_input(tmp_path: Path) -> None:
    def of(label: str, sites: dict[str, Tensor], fingerprint: str = "f") -> Shifts:
        return Shifts(label, sites, fingerprint, "Net")

    w = torch.ones(2, 2)
    with pytest.raises(exapt.InputError, match=r"a belongs to base f \(Net\), b to g"):
        combined("average", [of("a", {"x": w}), of("b", {"x": w}, "g")])
    assert combined("average", [of("a", {"x": w}), of("b", {"x": w}, "g")], force=True).dense("x").mean() == 1
    with pytest.raises(exapt.InputError, match="have no site in common"):
        combined("average", [of("a", {"x": w}), of("b", {"y": w})])
    with pytest.raises(exapt.InputError, match="differ in their sites: y; missing=zero"):
        combined("average", [of("a", {"x": w}), of("b", {"x": w, "y": w})])
    assert combined("average", [of("a", {"x": w}), of("b", {"x": w, "y": w})], missing="zero").dense("y").mean() == 0.5
    with pytest.raises(exapt.InputError, match="b holds NaN or infinity at x"):
        combined("average", [of("a", {"x": w}), of("b", {"x": w * torch.nan})])
    with pytest.raises(exapt.InputError, match="x: a has shape"):
        combined("average", [of("a", {"x": w}), of("b", {"x": torch.ones(3, 2)})])
    with pytest.raises(exapt.InputError, match="add up to zero"):
        combined("average", [of("a", {"x": w}), of("b", {"x": w})], [1, -1])
    with pytest.raises(exapt.InputError, match='has no "densty"'):
        combined("average", [of("a", {"x": w})], densty=1)
    with pytest.raises(exapt.InputError, match="rank is 0"):
        as_file(of("a", {"x": w}), rank=0)
    with pytest.raises(exapt.InputError, match="names C, which is no adapter"):
        arithmetic("A - C", {"A": of("a", {"x": w})})
    norm = exapt.attach(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), exapt.LNTuning())
    with torch.no_grad():
        next(iter(exapt.trainable(norm).values())).add_(1)
    with pytest.raises(exapt.InputError, match="no weight or bias of a plain layer"):
        shifts_on(norm, "default")


@pytest.mark.parametrize("rule", ["average", "task_arithmetic"])
def test_adapters_on_a_model_keep_their_factors(tmp_path: Path, rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 56))
    dense = []
    for name, method in (("a", exapt.LoRA(rank=2)), ("b", exapt.LoRA(rank=3, alpha=4.0, dropout=0.1)), ("c", exapt.PiSSA(rank=1))):
        exapt.attach(model, method, "all", name=name)
        exapt.activate(model, name)
        with torch.no_grad():
            for p in exapt.trainable(model).values():
                p.add_(0.3 * torch.randn_like(p))
        dense.append({k: (new - old).detach() for k, (old, new) in new_values(model, (name,)).items()})
        found = shifts_on(model, name)
        assert all(isinstance(m, LowRank) for m in found.matrices.values())
        for site in ("0", "2"):
            torch.testing.assert_close(found.dense(site), dense[-1][f"{site}.weight"], rtol=1e-5, atol=1e-6)
    exapt.combine(model, "a", "b", "c", rule=rule, weights=[1.0, 2.0, 3.0])
    scale = 1 / 6 if rule == "average" else 1.0
    merged = {k: (new - old).detach() for k, (old, new) in new_values(model, ("combined",)).items()}
    for k in ("0.weight", "2.weight"):
        torch.testing.assert_close(merged[k], scale * sum(w * d[k] for w, d in zip((1, 2, 3), dense, strict=True)), rtol=1e-5, atol=1e-5)
    path = exapt.save(model, tmp_path / "combined", "combined")
    assert {r["method"]["method"] for r in read(path).rules} == {"lora"}
    ranks = 2 + 3 + 2 * 1  # PiSSA's shift is what its factors gained: twice its rank
    assert sum(t.numel() for t in read(path).tensors.values()) == ranks * (64 + 48 + 48 + 56)
    exapt.combine(model, "a", "b", rule=rule, name="cut", rank=2)
    assert {r["method"]["rank"] for r in read(exapt.save(model, tmp_path / "cut", "cut")).rules} == {2}


def test_what_is_not_low_rank_on_a_model_stays_dense_and_right() -> None:
    model = exapt.attach(net(), {"0": exapt.LoRA(rank=2), "2": exapt.IA3()}, name="mixed")
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.add_(0.3)
    found = shifts_on(model, "mixed")
    assert isinstance(found.matrices["0"], LowRank)
    assert isinstance(found.matrices["2"], Tensor)
    for path, (old, new) in new_values(model, ("mixed",)).items():
        value = found.dense(path[0]) if path.endswith("weight") else found.biases[path[0]]
        torch.testing.assert_close(value, (new - old).detach(), rtol=1e-5, atol=1e-6)


def test_factors_of_a_half_precision_base_are_the_adapters_own() -> None:
    model = exapt.attach(net().bfloat16(), exapt.LoRA(rank=2), "all")
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.add_(0.3)
    own = exapt.trainable(model)
    found = shifts_on(model, "default").dense("0")
    torch.testing.assert_close(found, 8.0 * (own["0.exapt.default.B"] @ own["0.exapt.default.A"]).detach().float(), rtol=1e-5, atol=1e-6)
