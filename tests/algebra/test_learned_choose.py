"""Greedy soups, WiSE-FT, chosen weights and their uncertainty: against brute force, and on digits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_digits import DOMAINS, accuracy, digits, experts, network, trained
from torch import Tensor, nn

import exapt
from exapt.algebra.choose.rows import row_scores
from exapt.algebra.choose.soup import greedy_soup
from exapt.algebra.choose.sweeps import choose_weights, wise_ft
from exapt.algebra.choose.uncertainty import bootstrap_choice
from exapt.algebra.tensors import merge_tensors


def greedy(values: np.ndarray, target: np.ndarray, strict: bool) -> tuple[list[int], float]:
    """Recipe 1 for models that are vectors and minus their distance as score."""

    def score(x: np.ndarray) -> float:
        return round(-float(np.abs(x - target).sum()), 6)  # a tie is one whatever the order of summation

    order = sorted(range(len(values)), key=lambda i: -score(values[i]))
    inside = [order[0]]
    for i in order[1:]:
        with_it, without = score(values[[*inside, i]].mean(0)), score(values[inside].mean(0))
        if with_it > without or (with_it == without and not strict):
            inside.append(i)
    return inside, score(values[inside].mean(0))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=6), st.booleans())
def test_greedy_soup_is_recipe_1(points: list[tuple[int, int]], strict: bool) -> None:
    values, target = np.array(points, dtype=np.float64), np.zeros(2)
    models = [{"w": torch.tensor(v)} for v in values]
    soup = greedy_soup(models, lambda t: round(-float((t["w"] - torch.tensor(target)).abs().sum()), 6), strict=strict)
    inside, score = greedy(values, target, strict)
    assert soup.taken == tuple(f"model {i}" for i in inside)
    assert soup.score == pytest.approx(score, abs=1e-6)
    np.testing.assert_allclose(soup.tensors["w"].numpy(), values[inside].mean(0), atol=1e-12)
    assert soup.score >= max(s.alone for s in soup.steps)
    assert [s.name for s in soup.steps if s.taken] == list(soup.taken)


def test_greedy_soup_on_a_tie() -> None:
    models = [{"w": torch.tensor(1.0)}, {"w": torch.tensor(-1.0)}, {"w": torch.tensor(1.0)}]
    same = [greedy_soup(models, lambda t: 0.0, names=list("abc"), strict=s).taken for s in (False, True)]
    assert same == [("a", "b", "c"), ("a",)]


def test_greedy_soup_of_digits_is_no_worse_than_the_best_single() -> None:
    x, y, _, _ = digits()["upright"]
    base, _ = experts()
    models = [trained(base, x[:300], y[:300], 60, lr, i) for i, lr in enumerate((5e-3, 5e-3, 5e-3, 0.1))]
    soup = greedy_soup(models, row_scores(network(), x[500:], y[500:]), names=list("abcd"))
    singles = [float(row_scores(network(), x[500:], y[500:])(m).double().mean()) for m in models]
    assert soup.score >= max(singles)
    assert len(soup.taken) > 1, "of three alike and one that diverged, the three are averaged"
    assert "d" not in soup.taken
    assert soup.choice is not None
    assert soup.choice.scores[0] == pytest.approx(soup.score)
    assert accuracy(soup.tensors, "upright") > 0.9


@pytest.mark.parametrize("k", [1, 2, 3])
def test_bootstrap_against_all_samples(k: int) -> None:
    rows = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])[:k]
    samples = np.array([rows[:, list(drawn)].mean(1).numpy() for drawn in itertools.product(range(4), repeat=4)])  # all 256 that can be drawn
    wins = samples == samples.max(1, keepdims=True)
    found = bootstrap_choice(rows, draws=20_000)
    np.testing.assert_allclose(found.shares.numpy(), (wins / wins.sum(1, keepdims=True)).mean(0), atol=0.012)
    assert found.best == 0
    for mine, theirs in zip(found.interval, np.quantile(samples[:, 0], [0.025, 0.975]), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    if k > 1:
        lead = np.quantile(samples[:, 0] - samples[:, 1], [0.025, 0.975])
        np.testing.assert_allclose(found.lead, lead, atol=1e-6)
    assert bootstrap_choice(rows, draws=100).shares.tolist() == bootstrap_choice(rows, draws=100).shares.tolist()


def test_a_choice_says_when_it_is_a_guess() -> None:
    g = torch.Generator().manual_seed(0)
    close = (torch.rand(2, 40, generator=g) < 0.8).float()
    guess = bootstrap_choice(close)
    assert guess.lead[0] < 0 < guess.lead[1]
    assert set(guess.plausible) == {0, 1}
    sure = bootstrap_choice(torch.stack([torch.ones(40), torch.zeros(40)]))
    assert (sure.best, sure.plausible, sure.lead) == (0, (0,), (1.0, 1.0))
    tied = bootstrap_choice(torch.ones(3, 5))
    assert tied.tied == (0, 1, 2)
    assert tied.shares.tolist() == pytest.approx([1 / 3] * 3)


def test_wise_ft_is_the_line_between_two_models() -> None:
    x, y, _, _ = digits()["quarter turn"]
    base, tuned = experts()[0], experts()[1][1]
    sets = {d: row_scores(network(), digits()[d][0][:300], digits()[d][1][:300]) for d in DOMAINS}
    curve = wise_ft(base, tuned, sets, [0.0, 0.25, 0.5, 1.0], by="upright")
    for a, *scores in zip(curve.alphas, *curve.scores.values(), strict=True):
        line = {k: (1 - a) * base[k] + a * tuned[k] for k in base}
        assert [float(s) for s in scores] == pytest.approx([float(sets[d](line).mean()) for d in DOMAINS])
    assert curve.alpha == curve.alphas[int(curve.scores["upright"].argmax())]
    assert wise_ft(base, tuned, sets, by="quarter turn").alpha > curve.alpha, "its own domain asks for more of the fine-tuned model"
    ends = [wise_ft(base, tuned, row_scores(network(), x, y), [a]).tensors for a in (0.0, 1.0)]
    assert all(torch.equal(ends[0][k], base[k]) and torch.equal(ends[1][k], tuned[k]) for k in base)


@pytest.mark.parametrize("labelled", [True, False])
def test_chosen_weights_are_the_best_of_the_list(labelled: bool) -> None:
    base, models = experts()
    x = torch.cat([digits()[d][0][:60] for d in DOMAINS])
    y = torch.cat([digits()[d][1][:60] for d in DOMAINS])
    evaluate = row_scores(network(), x, y if labelled else None)
    found = choose_weights("task_arithmetic", models, base, evaluate)
    means = []
    for i in range(1, 11):
        merged = merge_tensors("task_arithmetic", models, base, [i / 10] * 3)
        with torch.no_grad():
            out = torch.func.functional_call(network(), merged, (x,)).double()
        p = out.softmax(1).numpy()
        means.append(np.mean(p.argmax(1) == y.numpy()) if labelled else np.sum(p * np.log(p), 1).mean())
    np.testing.assert_allclose(found.choice.scores.numpy(), means, rtol=1e-4)
    assert found.weights == (found.candidates[int(np.argmax(means))])
    low, high = found.interval[0]
    assert low <= found.weights[0] <= high
    pairs = choose_weights("average", models[:2], None, evaluate, [[1, 0], [0, 1], [1, 1]])
    assert pairs.candidates[pairs.choice.best] == pairs.weights


def test_row_scores_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    model[2].eval()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    other = {k: t + 1 for k, t in before.items()}
    rows = row_scores(model, {"input": torch.randn(5, 2)})(other)
    assert rows.shape == (5,)
    assert bool((rows <= 0).all())
    assert (model.training, model[1].training, model[2].training) == (True, True, False)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    likely = row_scores(model, torch.zeros(1, 2), torch.tensor([2]), score=lambda z, t: -nn.functional.cross_entropy(z, t, reduction="none"))
    assert likely(before)[0] < 0


def test_bad_input() -> None:
    one, zero = {"w": torch.ones(2)}, {"w": torch.zeros(2)}

    def score(t: dict[str, Tensor]) -> Tensor:
        return t["w"]

    with pytest.raises(exapt.InputError, match="0 names for 0 models"):
        greedy_soup([], score)
    with pytest.raises(exapt.InputError, match="b lacks w"):
        greedy_soup([one, {"v": torch.ones(2)}], lambda t: 1.0, names=["a", "b"])
    with pytest.raises(exapt.InputError, match="greedy_soup: the scores have shape"):
        greedy_soup([one], lambda t: torch.tensor([float("nan")]))
    with pytest.raises(exapt.InputError, match='wise_ft: no set "b"'):
        wise_ft(zero, one, {"a": score}, by="b")
    with pytest.raises(exapt.InputError, match=r"wise_ft: the shares are \[\]"):
        wise_ft(zero, one, score, [])
    with pytest.raises(exapt.InputError, match="there is no candidate"):
        choose_weights("average", [one], None, score, [])
    with pytest.raises(exapt.InputError, match="2 weights"):
        choose_weights("average", [one], None, score, [[1, 2]])
    with pytest.raises(exapt.InputError, match=r"2 candidates with \[2, 3\] rows"):
        bootstrap_choice([torch.ones(2), torch.ones(3)])
    with pytest.raises(exapt.InputError, match="at least 1 draw"):
        bootstrap_choice([torch.ones(2)], draws=0)
    with pytest.raises(exapt.InputError, match="row_scores: the scores have shape"):
        row_scores(nn.Linear(2, 2), torch.ones(3, 2), score=lambda z: z)({})
