"""What rules refuse, in one clear line each."""

from typing import Any

import pytest
import torch

import exapt
from exapt.algebra.rule import rule_of

X = torch.arange(12.0).reshape(3, 4) - 5
REFUSED: list[tuple[str, int, list[float] | None, dict[str, Any], str]] = [
    ("ties", 3, None, {"density": 1.2}, r"density=1.2: give one number from 0 to 1, or one for each of the 3 models"),
    ("ties", 3, None, {"density": [0.1, 0.2]}, r"one for each of the 3 models"),
    ("ties", 3, None, {"density": float("nan")}, r"density=nan"),
    ("ties", 3, None, {"consensus": "sums"}, r'consensus="sums".*none, sum, count'),
    ("ties", 3, None, {"rescale": "l2"}, r'rescale="l2".*none, density, l1'),
    ("dare", 3, [1.0, -1.0, 0.0], {"normalise": True}, r"add up to zero"),
    ("dare", 3, None, {"rescale": "L1"}, r'rescale="L1"'),
    ("della", 3, None, {"density": 0.9, "epsilon": 0.2}, r"epsilon=0.2: density 0.9 -/\+ epsilon must lie between 0 and 1"),
    ("della", 3, None, {"epsilon": -0.1}, r"epsilon=-0.1"),
    ("breadcrumbs", 3, None, {"gamma": 2.0}, r"gamma=2.0"),
    ("sce", 1, None, {"density": 0.5}, r"one model; give more, or density=1"),
    ("sce", 3, None, {"density": -1.0}, r"density=-1.0"),
    ("model_stock", 1, None, {}, r"at least 2 models"),
    ("slerp", 3, None, {}, r"slerp interpolates 2 models, and got 3; multislerp and karcher take any number"),
    ("nuslerp", 2, [1.0, -1.0], {}, r"add up to zero"),
    ("nuslerp", 1, None, {}, r"nuslerp interpolates 2 models"),
    ("multislerp", 3, [1.0, -0.5, -0.5], {}, r"add up to zero"),
    ("karcher", 3, [1.0, -1.0, 1.0], {}, r"must not be negative"),
    ("karcher", 3, [0.0, 0.0, 0.0], {}, r"one must be positive"),
    ("nearswap", 3, None, {}, r"one model into the base, and got 3"),
    ("nearswap", 1, None, {"t": -1.0}, r"t=-1.0"),
    ("ema", 3, None, {"decay": 1.5}, r"decay=1.5 must be from 0 to 1"),
    ("ema", 3, None, {"before": "first"}, r'before="first".*last, mean'),
]


@pytest.mark.parametrize(("rule", "count", "weights", "config", "message"), REFUSED)
def test_refused(rule: str, count: int, weights: list[float] | None, config: dict[str, Any], message: str) -> None:
    more = {} if weights is None else {"weights": torch.tensor(weights)}
    with pytest.raises(exapt.InputError, match=message):
        rule_of(rule).function(X[:count], **more, **config)


@pytest.mark.parametrize("rule", ["interpolate", "arcee_fusion"])
def test_rules_from_the_base_to_one_model_refuse_several(rule: str) -> None:
    with pytest.raises(exapt.InputError, match="and got 3"):
        rule_of(rule).function(X, base=X[0])


def test_a_dimension_that_is_not_there() -> None:
    with pytest.raises(exapt.InputError, match="dim=2, and a tensor has 2 dimensions"):
        rule_of("nuslerp").function(torch.zeros(2, 3, 3), dim=2)


def test_multislerp_of_directions_that_cancel_out() -> None:
    with pytest.raises(exapt.InputError, match="cancel out"):
        rule_of("multislerp").function(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("rule", ["ties", "dare", "della", "breadcrumbs", "sce", "model_stock", "ram", "karcher", "arcee_fusion", "nearswap", "slerp", "ema"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 1)])
def test_scalars_and_empty_tensors_pass(rule: str, shape: tuple[int, ...]) -> None:
    count = 1 if rule in ("arcee_fusion", "nearswap") else 2
    more = {"base": torch.zeros(shape)} if rule == "arcee_fusion" else {}
    merged = rule_of(rule).function(torch.ones(count, *shape), **more)
    assert merged.shape == shape
    assert bool(torch.isfinite(merged).all())
