"""Fusion of logits against a search in SciPy and NumPy, and in a decoding loop."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_digits import DOMAINS, digits, trained
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

import exapt
from exapt.algebra.logits import LogitsFusion, dynamic_logits_fusion, logit_ensemble


def objective(alphas: tuple[float, ...], large: np.ndarray, tuned: list[np.ndarray], small: np.ndarray) -> float:
    p, q = softmax(large), softmax(small)
    after = softmax(large + sum(a * (t - small) for a, t in zip(alphas, tuned, strict=True)))
    there, back = rel_entr(after, p).sum(), rel_entr(p, after).sum()
    return sum((there - rel_entr(softmax(t), q).sum()) ** 2 + (back - rel_entr(q, softmax(t)).sum()) ** 2 for t in tuned)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(1, 3), st.sampled_from(["one", "all"]), st.integers(0, 99))
def test_weights_are_the_best_of_the_grid(vocabulary: int, experts: int, how: str, seed: int) -> None:
    g = np.random.default_rng(seed)
    large, small = g.normal(size=(3, vocabulary)) * 2, g.normal(size=(3, vocabulary))
    tuned = [small + g.normal(size=(3, vocabulary)) for _ in range(experts)]
    found = dynamic_logits_fusion(torch.tensor(large), [torch.tensor(t) for t in tuned], torch.tensor(small), points=5, experts=how)  # type: ignore[arg-type]
    values = [0.0, 0.5, 1.0, 1.5, 2.0]
    every = list(itertools.product(values, repeat=experts))
    grid = [c for c in every if how == "all" or sum(x > 0 for x in c) <= 1]
    for i in range(3):
        at = (large[i], [t[i] for t in tuned], small[i])
        costs = [objective(c, *at) for c in grid]
        mine = tuple(found.alphas[i].tolist())
        assert mine in grid
        assert objective(mine, *at) == pytest.approx(min(costs), abs=1e-10)
        assert found.gap[i].item() == pytest.approx(min(costs), abs=1e-10)
        fused = large[i] + sum(a * (t - small[i]) for a, t in zip(mine, at[1], strict=True))
        np.testing.assert_allclose(found.logits[i].numpy(), fused, atol=1e-12)


def test_a_large_model_that_is_the_small_one_becomes_the_expert() -> None:
    small, tuned = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    found = dynamic_logits_fusion(small, tuned, small)
    torch.testing.assert_close(found.logits, tuned)
    assert found.alphas.shape == (2, 4, 1)
    assert found.gap.max() < 1e-10


def test_an_expert_that_learned_nothing_is_left_alone() -> None:
    large, small = torch.randn(5, 9), torch.randn(5, 9)
    found = dynamic_logits_fusion(large, [small, small], small, experts="all", points=4)
    assert torch.equal(found.alphas, torch.zeros(5, 2))
    assert torch.equal(found.logits, large)


def test_fixed_weights() -> None:
    large, small, one, two = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(logit_ensemble(large, one, small), large + one - small)
    torch.testing.assert_close(logit_ensemble(large, [one, two], small, [0.5, -1.0]), large + 0.5 * (one - small) - (two - small))
    assert torch.equal(logit_ensemble(large, one, small, 0.0), large)
    shifted = logit_ensemble(large, one + 3, small)  # a constant in a model's logits means nothing
    torch.testing.assert_close(shifted.softmax(-1), logit_ensemble(large, one, small).softmax(-1))


class Words(nn.Module):
    """Predicts a token from the one before."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


@pytest.mark.parametrize("alpha", [None, [1.0, 0.5]])
def test_a_decoding_loop_fuses_every_step(alpha: list[float] | None) -> None:
    large, small, one, two = (Words(i) for i in range(4))
    fusion = LogitsFusion(small, [one, two], alpha, {} if alpha else {"points": 11})
    ids = torch.tensor([[1], [5]])
    expected = ids
    for _ in range(6):
        ids = torch.cat([ids, fusion(ids, large(ids)[:, -1].detach()).argmax(-1, keepdim=True)], 1)
        last = [m(expected)[:, -1].detach() for m in (large, one, two, small)]
        rows = []
        for z, a, b, s in zip(*(x.double().numpy() for x in last), strict=True):
            grid = [(x, 0.0) for x in np.linspace(0, 2, 11)] + [(0.0, x) for x in np.linspace(0, 2, 11)]
            best = (1.0, 0.5) if alpha else min(grid, key=lambda c: objective(c, z, [a, b], s))
            rows.append(int(np.argmax(z + best[0] * (a - s) + best[1] * (b - s))))
        expected = torch.cat([expected, torch.tensor(rows)[:, None]], 1)
    assert torch.equal(ids, expected)
    assert [a.shape for a in fusion.alphas] == ([] if alpha else [(2, 2)] * 6)


def test_a_small_expert_lifts_a_large_model_on_digits() -> None:
    """The large network never sees turned digits in training; the small one's shift brings most of what it learned of them."""

    def network(width: int) -> nn.Sequential:
        torch.manual_seed(width)
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    x, y, _, _ = digits()["upright"]
    turned, labels, test, answers = digits()[DOMAINS[1]]
    large = network(48)
    large.load_state_dict(trained(dict(large.state_dict()), x, y, 150, 3e-3, 0))
    small = nn.Sequential(nn.Linear(64, 10))
    expert = nn.Sequential(nn.Linear(64, 10))
    for model, (rows, of) in ((small, (x, y)), (expert, (turned, labels))):
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(200):
            loss = nn.functional.cross_entropy(model(rows), of)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        z = [m(test) for m in (large, expert, small)]
    found = dynamic_logits_fusion(*z)

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(1) == answers).float().mean())

    assert accuracy(found.logits) > accuracy(z[0]) + 0.3
    assert accuracy(logit_ensemble(*z)) > accuracy(z[0]) + 0.3


@pytest.mark.slow
def test_as_a_logits_processor_of_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList

    def model(seed: int, width: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=None)).eval()

    large, small, expert = model(0, 16), model(1, 8), model(2, 8)
    ids = torch.tensor([[3, 4]])
    fusion = LogitsFusion(small, [expert], settings={"high": 40.0})
    out = large.generate(ids, max_new_tokens=5, do_sample=False, logits_processor=LogitsProcessorList([fusion]), pad_token_id=0)
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            z = [m(expected).logits[:, -1] for m in (large, expert, small)]
            expected = torch.cat([expected, dynamic_logits_fusion(*z, high=40.0).logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, expected)
    assert len(fusion.alphas) == 5


def test_bad_input() -> None:
    z = torch.zeros(2, 5)
    with pytest.raises(exapt.InputError, match=r"small model 0 has logits \(2, 4\), the large one \(2, 5\)"):
        dynamic_logits_fusion(z, torch.zeros(2, 4), z)
    with pytest.raises(exapt.InputError, match="no fine-tuned small model"):
        logit_ensemble(z, [], z)
    with pytest.raises(exapt.InputError, match="the large model hold NaN or infinity"):
        logit_ensemble(torch.full((2, 5), -math.inf), z, z)
    with pytest.raises(exapt.InputError, match=r"\(2,\) weights for 1 small models"):
        logit_ensemble(z, z, z, [1.0, 2.0])
    with pytest.raises(exapt.InputError, match=r"no grid of 0 points"):
        dynamic_logits_fusion(z, z, z, points=0)
    with pytest.raises(exapt.InputError, match="over 20000 combinations"):
        dynamic_logits_fusion(z, [z] * 4, z, experts="all")
    with pytest.raises(exapt.InputError, match='experts is "both"'):
        dynamic_logits_fusion(z, z, z, experts="both")  # type: ignore[arg-type]
