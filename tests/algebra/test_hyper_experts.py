"""Experts of shared tensors, surgery on experts, and the alignment of a new modality."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn

import exapt
from exapt.algebra.hyper.alignment import aligned_start, entropic_coupling
from exapt.algebra.hyper.modular import add_experts, only_new, prune_experts, task_information
from exapt.algebra.hyper.mpoe import MPOExperts, compose, decompose, factors
from exapt.core.errors import InputError
from exapt.methods.pesc import PESC
from exapt.shift.diagnose.graphon import gromov_wasserstein


def by_sums(tensors: list[np.ndarray]) -> np.ndarray:
    """The matrix of tensors, entry by entry from the definition."""
    rows, columns = [t.shape[1] for t in tensors], [t.shape[2] for t in tensors]
    w = np.zeros((np.prod(rows), np.prod(columns)))
    for i, row in enumerate(itertools.product(*map(range, rows))):
        for j, column in enumerate(itertools.product(*map(range, columns))):
            product = np.eye(1)
            for t, a, b in zip(tensors, row, column, strict=True):
                product = product @ t[:, a, b]
            w[i, j] = product[0, 0]
    return w


def test_decomposition_is_exact_and_truncation_leaves_what_the_singular_values_say() -> None:
    w = torch.randn(12, 8, dtype=torch.double)
    parts = decompose(w, [2, 3, 2], [2, 2, 2])
    np.testing.assert_allclose(by_sums([t.numpy() for t in parts]), w.numpy(), atol=1e-10)
    torch.testing.assert_close(compose(parts), w)
    assert parts[1].numel() > parts[0].numel() + parts[2].numel()
    cut = decompose(w, [2, 3, 2], [2, 2, 2], bond=2)
    assert max(max(t.shape[0], t.shape[3]) for t in cut) == 2
    np.testing.assert_allclose(compose(cut).numpy(), by_sums([t.numpy() for t in cut]), atol=1e-10)
    order = w.numpy().reshape(2, 3, 2, 2, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    dropped = [np.linalg.svd(order.reshape(4**k if k == 1 else 24, -1), compute_uv=False)[2:] for k in (1, 2)]
    assert float((compose(cut) - w).square().sum()) <= sum((s**2).sum() for s in dropped) + 1e-9  # the bound of TT-SVD
    assert [int(np.prod(factors(n, 5))) for n in (768, 3072, 13)] == [768, 3072, 13]


def test_mpoe_against_its_formulas() -> None:
    up, down = nn.Linear(8, 12), nn.Linear(12, 8)
    experts = MPOExperts(up, down, torch.tanh, experts=3, length=3)
    x = torch.randn(2, 7, 8)
    with torch.no_grad():
        dense = down(torch.tanh(up(x)))
        best = (x @ experts.router.T).softmax(-1).max(-1)
        torch.testing.assert_close(experts(x), dense * best.values[..., None], rtol=1e-4, atol=1e-5)
        for t in experts.parameters():
            t.add_(0.2 * torch.randn_like(t))
    expected, load, mean = np.zeros((14, 8)), np.zeros(3), np.zeros(3)
    for n, token in enumerate(x.reshape(-1, 8).numpy()):
        scores = np.exp(experts.router.detach().numpy() @ token)
        p = scores / scores.sum()
        i, h = int(p.argmax()), token
        for matrix in (experts.up, experts.down):
            parts = [t[i].detach().numpy() for t in matrix.auxiliary]
            h = by_sums([parts[0], matrix.central.detach().numpy(), parts[1]]) @ h + matrix.bias[i].detach().numpy()
            h = np.tanh(h) if matrix is experts.up else h
        expected[n] = p[i] * h
        load[i] += 1 / 14
        mean += p / 14
    np.testing.assert_allclose(experts(x).detach().numpy().reshape(14, 8), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(experts.load.numpy(), load, rtol=1e-5)
    np.testing.assert_allclose(experts.balance.item(), 3 * (load * mean).sum(), rtol=1e-5)


def test_mpoe_costs_little_more_than_one_expert_and_masks_central_gradients() -> None:
    up, down = nn.Linear(64, 256), nn.Linear(256, 64)
    dense = sum(p.numel() for p in (*up.parameters(), *down.parameters()))
    experts = MPOExperts(up, down, torch.relu, experts=8, bond=24, mask=0.5)
    copies = 8 * dense
    assert sum(p.numel() for p in experts.parameters()) < 0.35 * copies
    moved = []
    for _ in range(40):
        experts.zero_grad()
        experts(torch.randn(16, 64)).square().sum().backward()
        moved.append(bool(experts.up.central.grad.any()))
        assert any(t.grad.any() for t in experts.up.auxiliary)
    assert 10 <= sum(moved) <= 30


def test_pruned_experts_change_nothing_where_they_were_not_used() -> None:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(6, 6))
    model = exapt.attach(base, PESC(experts=6, top_k=2, bottleneck=3), where="0")
    x = torch.randn(40, 6) * 0.2 + torch.tensor([2.0, 0, 0, -1, 0, 0])
    with torch.no_grad():
        for t in exapt.trainable(model).values():
            t.copy_(torch.randn_like(t))
    y = model(x).detach()
    tensors = {n.rpartition(".")[2]: t.detach() for n, t in exapt.trainable(model).items()}
    left, kept = prune_experts(tensors, exapt.noted(model)["0"]["load"], threshold=1e-6, least=2)
    assert 2 <= len(kept) < 6
    exapt.detach(model)
    small = exapt.attach(model, PESC(experts=len(kept), top_k=2, bottleneck=3), where="0")
    with torch.no_grad():
        for n, t in exapt.trainable(small).items():
            t.copy_(left[n.rpartition(".")[2]])
    torch.testing.assert_close(small(x), y)


def test_new_experts_are_copies_and_old_ones_stay() -> None:
    tensors = {"R": torch.randn(3, 4), "U": torch.randn(3, 4, 2)}
    grown = add_experts(tensors, [2, 0])
    for k, t in tensors.items():
        assert torch.equal(grown[k][:3], t)
        assert torch.equal(grown[k][3:], t[[2, 0]])
    noisy = add_experts(tensors, [2, 0], noise=0.1)
    assert torch.equal(noisy["R"][:3], tensors["R"])
    assert 0 < float((noisy["R"][3:] - tensors["R"][[2, 0]]).abs().max()) < 1
    w = grown["U"].requires_grad_()
    only_new({"U": w}, 3)
    w.square().sum().backward()
    assert not w.grad[:3].any()
    assert w.grad[3:].any()


def test_information_of_tasks_and_experts() -> None:
    generator = np.random.default_rng(0)
    tasks, experts = np.repeat(np.arange(3), 50), generator.integers(4, size=150)
    experts[:30] = 0
    hard = torch.eye(4, dtype=torch.double)[experts]
    np.testing.assert_allclose(float(task_information(hard, torch.tensor(tasks), 3)), mutual_info_score(tasks, experts), rtol=1e-8)
    logits = torch.randn(150, 4, requires_grad=True)
    (-task_information(logits.softmax(-1), torch.tensor(tasks), 3)).backward()
    assert logits.grad.any()


def test_alignment_finds_an_isometry_and_is_no_worse_than_conditional_gradient() -> None:
    rng = np.random.default_rng(0)
    text = rng.normal(size=(12, 3))
    order = rng.permutation(12)
    turned = np.linalg.qr(rng.normal(size=(5, 3)))[0]  # another space, of five dimensions
    new = 3 * text[order] @ turned.T
    start = aligned_start(torch.tensor(new), torch.tensor(text), epsilon=0.02)
    np.testing.assert_allclose(start.numpy(), text[order], atol=0.05)
    a, b = (np.linalg.norm(t[:, None] - t, axis=-1) for t in (text, rng.normal(size=(12, 3))))
    coupling = entropic_coupling(a, b)
    np.testing.assert_allclose(coupling.sum(1), 1 / 12, rtol=0.01)
    np.testing.assert_allclose(coupling.sum(0), 1 / 12, atol=1e-6)
    value = (a**2).sum() / 144 + (b**2).sum() / 144 - 2 * ((a @ coupling @ b) * coupling).sum()
    assert value <= 1.15 * gromov_wasserstein(a, b)[0]
    assert aligned_start(torch.randn(5, 4), torch.randn(9, 3)).shape == (5, 3)  # sizes may differ


def test_what_they_refuse() -> None:
    with pytest.raises(InputError, match="no factors of a 4x6 matrix"):
        decompose(torch.zeros(4, 6), [2, 2], [2, 2])
    with pytest.raises(InputError, match="length is 4"):
        MPOExperts(nn.Linear(4, 4), nn.Linear(4, 4), torch.relu, length=4)
    with pytest.raises(InputError, match="gives 4 features, the second takes 5"):
        MPOExperts(nn.Linear(4, 4), nn.Linear(5, 4), torch.relu)
    with pytest.raises(InputError, match="does not have 3 experts first"):
        prune_experts({"R": torch.zeros(2, 3)}, torch.ones(3))
    with pytest.raises(InputError, match="count from 0"):
        add_experts({"R": torch.zeros(2, 3)}, [2])
    with pytest.raises(InputError, match="two or more vectors"):
        aligned_start(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(InputError, match="NaN or infinity"):
        aligned_start(torch.full((2, 2), torch.nan), torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"give \(tokens, E\)"):
        task_information(torch.zeros(3), torch.zeros(3), 2)
