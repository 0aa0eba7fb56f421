"""Language and task arithmetic and the reverse-engineered adapter, by hand and on small problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exapt.algebra.arithmetic_recipes import language_and_task, low_rank, re_adapted
from exapt.core.errors import InputError


def tree(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"A": torch.randn(3, 4, generator=g, dtype=torch.double), "b": torch.randn(4, generator=g, dtype=torch.double)}


def test_language_and_task_by_hand() -> None:
    start, task, de, nl, en = (tree(i) for i in range(5))
    got = language_and_task(task, [de, nl], [en], weight=0.7, start=start)
    for k, t in got.items():
        tau = {n: (m[k] - start[k]).numpy() for n, m in {"task": task, "de": de, "nl": nl, "en": en}.items()}
        expected = start[k].numpy() + 0.7 * tau["task"] + 0.3 * ((tau["de"] + tau["nl"]) / 2 - tau["en"])
        np.testing.assert_allclose(t, expected, rtol=1e-12)
    torch.testing.assert_close(language_and_task(task, [de], weight=1.0), task)
    torch.testing.assert_close(language_and_task(task, [de], weight=0.0), de)


def test_re_adapted_by_hand_and_in_low_rank() -> None:
    base, tuned, domain = (tree(i) for i in range(3))
    got = re_adapted(base, tuned, domain, tuned_weight=0.8, domain_weight=0.5)
    for k, t in got.items():
        np.testing.assert_allclose(t, base[k] + 0.8 * (tuned[k] - base[k]) + 0.5 * (domain[k] - base[k]), rtol=1e-12)
    u, s, v = np.linalg.svd((tuned["A"] - base["A"]).numpy())
    share = np.cumsum(s**2) / (s**2).sum()
    for rank in (1, 2):
        energy = float(share[rank - 1]) - 1e-4
        low = (u[:, :rank] * s[:rank]) @ v[:rank]
        np.testing.assert_allclose(low_rank(tuned["A"] - base["A"], energy), low, atol=1e-5)
        np.testing.assert_allclose(re_adapted(base, tuned, domain, energy=energy)["A"], domain["A"].numpy() + low, atol=1e-5)
    torch.testing.assert_close(re_adapted(base, tuned, domain, energy=0.5)["b"], re_adapted(base, tuned, domain)["b"])  # vectors stay whole


def fit(x: Tensor, y: Tensor, w: Tensor, steps: int = 300) -> dict[str, Tensor]:
    w = w.clone().requires_grad_()
    optimiser = torch.optim.SGD([w], lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        (x @ w.T - y).square().mean().backward()
        optimiser.step()
    return {"w": w.detach()}


def test_a_skill_is_kept_where_knowledge_is_added() -> None:
    """One linear model: labels teach it two inputs, text of a domain two others; the sum of both shifts knows all four."""
    g = torch.Generator().manual_seed(0)
    truth, base = torch.randn(2, 4, generator=g), {"w": torch.zeros(2, 4)}
    skill, domain = torch.randn(100, 4, generator=g), torch.randn(100, 4, generator=g)
    skill[:, 2:], domain[:, :2] = 0, 0
    tuned, read = fit(skill, skill @ truth.T, base["w"]), fit(domain, domain @ truth.T, base["w"])
    both = re_adapted(base, tuned, read)["w"]
    error = {name: float((w - truth).square().mean()) for name, w in {"both": both, "tuned": tuned["w"], "read": read["w"]}.items()}
    assert error["both"] < 1e-3 < 0.05 < min(error["tuned"], error["read"])


def test_what_it_refuses() -> None:
    task = tree(0)
    with pytest.raises(InputError, match="from 0 to 1"):
        language_and_task(task, [task], weight=1.5)
    with pytest.raises(InputError, match="no language adapter"):
        language_and_task(task, [])
    with pytest.raises(InputError, match="language 0 lacks b"):
        language_and_task(task, [{"A": task["A"]}])
    with pytest.raises(InputError, match="energy is 0"):
        re_adapted(task, task, task, energy=0)
    with pytest.raises(InputError, match="domain lacks A"):
        re_adapted(task, task, {"b": task["b"]})
