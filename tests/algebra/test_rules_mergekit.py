"""Every merge rule of mergekit 0.1.5, through the whole of merge_tensors, against mergekit: equal to 1e-6."""

from typing import Any

import pytest
import torch
from torch import Tensor

from exapt.algebra.rule import rule_of
from exapt.algebra.rules.dare import dare_merged
from exapt.algebra.rules.della import della_merged
from exapt.algebra.sparsify import agreeing
from exapt.algebra.tensors import merge_tensors

mergekit = pytest.importorskip("mergekit.merge_methods")

SHAPES = {"matrix": (12, 7), "vector": (33,), "wide": (3, 64), "three": (4, 5, 6), "one": (1,), "row": (1, 9)}


def trees(count: int, shapes: dict[str, tuple[int, ...]] = SHAPES, size: float = 0.3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(count)
    base = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    return base, [{k: v + size * torch.randn(v.shape, generator=g) for k, v in base.items()} for _ in range(count)]


def theirs(method: str, base: dict[str, Tensor] | None, models: list[dict[str, Tensor]], **parameters: Any) -> dict[str, Tensor]:
    named = ({"base": base} if base is not None else {}) | {str(i): m for i, m in enumerate(models)}
    return mergekit.merge_state_dicts(named, method, base=None if base is None else "base", parameters=parameters)


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(ours) == set(expected)
    for name, t in expected.items():
        torch.testing.assert_close(ours[name], t, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


W = [0.7, 1.3, 0.4]
# our rule and settings; mergekit's method and parameters
ON_TASK_VECTORS = [
    ("task_arithmetic", {}, "task_arithmetic", {}),
    ("task_arithmetic", {"scale": 0.3}, "task_arithmetic", {"lambda": 0.3}),
    ("ties", {}, "ties", {"density": 0.2}),
    ("ties", {"density": 0.5, "scale": 1.7}, "ties", {"density": 0.5, "lambda": 1.7}),
    ("ties", {"density": [0.1, 0.6, 1.0]}, "ties", {"density": [0.1, 0.6, 1.0]}),
    ("ties", {"density": 0.0}, "ties", {"density": 0.0}),
    ("ties", {"density": 0.4, "normalise": False, "rescale": "l1"}, "ties", {"density": 0.4, "normalize": False, "rescale": True}),
    ("breadcrumbs", {}, "breadcrumbs", {"density": 0.9, "gamma": 0.01}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1, "scale": 0.5}, "breadcrumbs", {"density": 0.5, "gamma": 0.1, "lambda": 0.5}),
    ("breadcrumbs", {"density": 0.95, "gamma": 0.2}, "breadcrumbs", {"density": 0.95, "gamma": 0.2}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1, "rescale": "l1"}, "breadcrumbs", {"density": 0.6, "gamma": 0.1, "rescale": True}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1, "consensus": "sum"}, "breadcrumbs_ties", {"density": 0.6, "gamma": 0.1}),
    ("sce", {"floor": 1e-6}, "sce", {}),
    ("sce", {"density": 0.3, "floor": 1e-6}, "sce", {"select_topk": 0.3}),
    ("sce", {"density": 0.0, "floor": 1e-6}, "sce", {"select_topk": 0.0}),
    ("model_stock", {}, "model_stock", {}),
    ("model_stock", {"filter_wise": True}, "model_stock", {"filter_wise": True}),
    ("ram", {}, "ram", {}),
    ("ram", {"epsilon": 0.3}, "ram", {"epsilon": 0.3}),
    ("ram", {"epsilon": 0.3, "r": 0.1}, "ramplus_tl", {"epsilon": 0.3}),
    ("ram", {"epsilon": 0.5, "r": 0.7, "alpha": 2.0}, "ramplus_tl", {"epsilon": 0.5, "r": 0.7, "alpha": 2.0}),
]


@pytest.mark.parametrize(("rule", "config", "method", "parameters"), ON_TASK_VECTORS)
def test_on_task_vectors(rule: str, config: dict[str, Any], method: str, parameters: dict[str, Any]) -> None:
    base, models = trees(3)
    weighted = method not in ("sce", "model_stock", "ram", "ramplus_tl")
    expected = theirs(method, base, models, **parameters, **({"weight": W} if weighted else {}))
    assert_equal(merge_tensors(rule, models, base, W if weighted else None, **config), expected)


@pytest.mark.parametrize("consensus", ["none", "sum"])
@pytest.mark.parametrize("density", [0.3, 0.8, 1.0])
def test_dare_and_della_where_the_masks_are_the_same(consensus: str, density: float) -> None:
    """One tensor, and both generators at one seed: the draws are the same then."""
    (base, models), epsilon = trees(3, {"matrix": (40, 30)}), 0.1
    stacked = torch.stack([m["matrix"] - base["matrix"] for m in models])
    for rule, method, more, extra in (
        (dare_merged, {"none": "dare_linear", "sum": "dare_ties"}[consensus], {}, {}),
        (della_merged, {"none": "della_linear", "sum": "della"}[consensus], {"epsilon": epsilon}, {"normalise": consensus == "sum"}),
    ):
        for rescale in (True, False):
            torch.manual_seed(5)
            expected = theirs(method, base, models, weight=W, density=density, rescale=rescale, **more)["matrix"]
            ours = rule(
                stacked, torch.tensor(W), torch.Generator().manual_seed(5), density=density, consensus=consensus, rescale="l1" if rescale else "none",
                **more, **extra,
            )  # fmt: skip
            torch.testing.assert_close(base["matrix"] + ours, expected, rtol=1e-6, atol=1e-6)
            if density < 1:
                assert 0 < int((ours == 0).sum()) < ours.numel()


def test_count_consensus() -> None:
    """mergekit elects by count in a function of its own, which no method of its registry takes."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask

    g = torch.Generator().manual_seed(0)
    deltas = torch.randn(5, 8, 9, generator=g) * (torch.rand(5, 8, 9, generator=g) > 0.3)
    for consensus in ("sum", "count"):
        assert torch.equal(agreeing(deltas, consensus), get_mask(deltas, consensus))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp(t: float) -> None:
    base, models = trees(1, size=2.0)
    assert_equal(merge_tensors("slerp", [base, *models], t=t), theirs("slerp", base, models, t=t))


def test_slerp_of_nearly_parallel_and_of_zero_tensors() -> None:
    base, models = trees(1, size=1e-3)
    base |= {"zero": torch.zeros(6), "opposite": -models[0]["vector"]}
    models[0] |= {"zero": torch.randn(6), "opposite": models[0]["vector"]}
    assert_equal(merge_tensors("slerp", [base, *models], t=0.3), theirs("slerp", base, models, t=0.3))
    for tree in (base, models[0]):
        del tree["opposite"]  # mergekit divides by a rounding error there
    got = {k: direct("nuslerp", [base, *models], None, k, torch.tensor([2.0, 1.0])) for k in base}
    assert_equal(got, theirs("nuslerp", None, [base, *models], weight=[2.0, 1.0]))


@pytest.mark.parametrize(("dim", "rows"), [(None, {}), (-1, {"nuslerp_flatten": False}), (0, {"nuslerp_flatten": False, "nuslerp_row_wise": True})])
def test_nuslerp_with_and_without_a_base(dim: int | None, rows: dict[str, bool]) -> None:
    base, models = trees(2, size=1.0)
    for still in (base, None):
        expected = theirs("nuslerp", still, models, weight=[0.2, 0.7], **rows)
        got = {k: direct("nuslerp", models, still, k, torch.tensor([0.2, 0.7]), dim=dim) for k in base}
        assert_equal(got, expected, 3e-5)  # single precision's angle between nearly parallel vectors: in double, mergekit's is 5e-6 off, ours 2e-5


@pytest.mark.parametrize("normalise", [True, False])
def test_multislerp_with_and_without_a_base(normalise: bool) -> None:
    base, models = trees(3, size=1.0)
    for still in (base, None):
        expected = theirs("multislerp", still, models, weight=W, normalize_weights=normalise)
        got = {k: direct("multislerp", models, still, k, torch.tensor(W), normalise=normalise) for k in base}
        assert_equal(got, expected)


def direct(rule: str, models: list[dict[str, Tensor]], base: dict[str, Tensor] | None, name: str, weights: Tensor, **config: Any) -> Tensor:
    return rule_of(rule).function(torch.stack([m[name] for m in models]), weights, None if base is None else base[name], **config)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_karcher(count: int) -> None:
    _, models = trees(count, size=2.0)
    assert_equal(merge_tensors("karcher", models), theirs("karcher", None, models))


def test_karcher_with_weights() -> None:
    from mergekit.merge_methods.karcher import karcher_merge_tensors

    _, models = trees(3, size=2.0)
    w = [x / sum(W) for x in W]
    expected = {k: karcher_merge_tensors([m[k] for m in models], w) for k in SHAPES}
    assert_equal(merge_tensors("karcher", models, weights=W), expected)


@pytest.mark.parametrize("t", [0.0, 0.1, 10.0])
def test_nearswap(t: float) -> None:
    base, models = trees(1)
    assert_equal(merge_tensors("nearswap", models, base, t=t), theirs("nearswap", base, models, t=t))


def test_arcee_fusion() -> None:
    base, models = trees(1)
    assert_equal(merge_tensors("arcee_fusion", models, base), theirs("arcee_fusion", base, models))


@pytest.mark.parametrize("normalise", [True, False])
def test_linear(normalise: bool) -> None:
    _, models = trees(3)
    assert_equal(merge_tensors("average", models, weights=W, normalise=normalise), theirs("linear", None, models, weight=W, normalize=normalise))


def test_interpolate_is_linear_with_two_weights() -> None:
    base, models = trees(1)
    expected = theirs("linear", None, [base, *models], weight=[0.3, 0.7])
    assert_equal(merge_tensors("interpolate", models, base, alpha=0.7), expected)


LARGE = [
    ("ties", {}, "ties", {"density": 0.2}, True), ("breadcrumbs", {}, "breadcrumbs", {"density": 0.9}, True),
    ("sce", {"density": 0.5}, "sce", {"select_topk": 0.5}, True),
    ("model_stock", {}, "model_stock", {}, True), ("ram", {}, "ram", {}, True), ("karcher", {}, "karcher", {}, False), ("average", {}, "linear", {}, False),
    ("multislerp", {}, "multislerp", {}, True),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "config", "method", "parameters", "on_base"), LARGE)
def test_large_tensors_in_double_precision_and_single_is_as_near_to_double(
    rule: str, config: dict[str, Any], method: str, parameters: dict[str, Any], on_base: bool
) -> None:
    """Over long rows mergekit's norms lose four digits in single precision, so there the comparison is in double; ours lose none."""
    base, models = trees(3, {"w": (400, 500)}, size=0.02)
    base, *models = ({"w": t["w"].double()} for t in (base, *models))
    weights = {} if method in ("sce", "model_stock", "ram", "karcher") else {"weight": 1.0}
    expected = theirs(method, base if on_base else None, models, **parameters, **weights)["w"]
    ours = merge_tensors(rule, models, base if on_base else None, **config)["w"]
    sorts = rule in ("ties", "breadcrumbs")  # mergekit compares sizes in single precision: some entries at the threshold are equal there
    assert int(((ours - expected).abs() > 1e-7).sum()) <= (4 if sorts else 0)
    single = merge_tensors(rule, [{"w": m["w"].float()} for m in models], {"w": base["w"].float()} if on_base else None, **config)["w"]
    assert int(((single.double() - ours).abs() > 2e-6).sum()) <= (4 if sorts else 2), "single precision decides otherwise at the threshold only"


def test_every_method_of_mergekit_has_a_rule() -> None:
    """passthrough merges nothing."""
    here = {m for _, _, m, _ in ON_TASK_VECTORS} | {"dare_linear", "dare_ties", "della", "della_linear", "slerp", "nuslerp", "multislerp", "karcher"}
    assert {m.spec.name for m in mergekit.registered_methods()} == here | {"nearswap", "arcee_fusion", "linear", "passthrough"}
