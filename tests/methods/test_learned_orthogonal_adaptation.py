"""Orthogonal Adaptation against the paper's equations in NumPy, and what its sums leave of each adapter."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exapt
from exapt import OrthogonalAdaptation


def attached(layer: nn.Linear, **fields: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with the adapter, its trained factor drawn at random, and both factors."""
    model = exapt.attach(nn.Sequential(copy.deepcopy(layer)), OrthogonalAdaptation(**fields), where="all")
    tensors = {k.rsplit(".", 1)[-1]: t for k, t in model.state_dict(keep_vars=True).items()}
    (a,) = exapt.trainable(model).values()
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(fields.get("concept", 0))))
    return model, a.detach(), tensors["B"].detach()


@pytest.mark.parametrize("columns", ["random", "disjoint", "gaussian"])
def test_the_update_is_a_times_b_transposed(columns: str) -> None:
    layer, x = nn.Linear(12, 5), torch.randn(7, 12)
    model, a, b = attached(layer, rank=3, columns=columns, scale=0.6)
    w = layer.weight.detach().numpy() + 0.6 * a.numpy() @ b.numpy().T
    expected = x.numpy() @ w.T + layer.bias.detach().numpy()
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert [t.shape for t in exapt.trainable(model).values()] == [(5, 3)]
    if columns != "gaussian":
        np.testing.assert_allclose(b.numpy().T @ b.numpy(), np.eye(3), atol=1e-6)


def test_concepts_share_one_basis() -> None:
    layer = nn.Linear(12, 5)
    basis = np.concatenate([attached(layer, rank=3, concept=i, columns="disjoint")[2].numpy() for i in range(4)], 1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(12), atol=1e-6)
    for concept in range(5):
        drawn = attached(layer, rank=3, concept=concept)[2].numpy()
        inside = np.abs(basis.T @ drawn)
        np.testing.assert_allclose(np.sort(inside, 0)[-1], 1, atol=1e-6)  # each column is one of the basis'
        np.testing.assert_allclose(inside.sum(), 3, atol=1e-4)
    one, other = attached(layer, rank=3)[2], attached(layer, rank=3, seed=1)[2]
    assert not torch.allclose(one, other)
    assert torch.equal(one, attached(layer, rank=3)[2])


def test_a_sum_of_disjoint_adapters_leaves_each_as_it_is_in_its_own_subspace() -> None:
    layer = nn.Linear(12, 5)
    parts = [attached(layer, rank=3, concept=i, columns="disjoint") for i in range(3)]
    w = layer.weight.detach()
    merged = w + sum(a @ b.T for _, a, b in parts)
    for model, _, b in parts:
        x = torch.randn(6, 3) @ b.T  # inputs in the span of this concept's B
        torch.testing.assert_close(x @ merged.T + layer.bias, model(x), atol=1e-5, rtol=1e-4)
    plain = [(torch.randn(5, 3), torch.randn(3, 12) * 12**-0.5) for _ in range(3)]  # LoRA: the factors of two adapters meet
    x = torch.randn(6, 3) @ plain[0][1]
    apart = x @ sum(b @ a for b, a in plain[1:]).T
    assert apart.norm() > 0.1 * (x @ (plain[0][0] @ plain[0][1]).T).norm()


def test_the_library_merges_them_by_their_sum() -> None:
    layer, x = nn.Linear(12, 5), torch.randn(4, 12)
    model = nn.Sequential(copy.deepcopy(layer))
    for i in range(2):
        exapt.attach(model, OrthogonalAdaptation(rank=3, concept=i, columns="disjoint"), where="all", name=f"concept-{i}")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".A"):
                p.normal_()
    alone = []
    for i in range(2):
        exapt.activate(model, f"concept-{i}")
        alone.append(model(x).detach() - layer(x).detach())
    exapt.combine(model, "concept-0", "concept-1", rule="task_arithmetic", scale=0.6)
    torch.testing.assert_close(model(x).detach(), layer(x).detach() + 0.6 * (alone[0] + alone[1]), atol=1e-5, rtol=1e-4)


def test_crosstalk_is_less_than_of_gaussian_factors() -> None:
    layer = nn.Linear(64, 8)

    def crosstalk(columns: str) -> float:
        b = [attached(layer, rank=4, concept=i, columns=columns)[2].numpy() for i in range(12)]
        pairs = [np.linalg.norm(b[i].T @ b[j]) for i in range(12) for j in range(i)]
        return float(np.mean(pairs))

    assert crosstalk("disjoint") < 1e-5
    assert crosstalk("random") < crosstalk("gaussian") / 1.5
    # of 64 columns two concepts share 4 * 4 / 64 = 0.25 on average; entries of a Gaussian product have variance 1 / 64
    assert crosstalk("gaussian") == pytest.approx(np.sqrt(16 / 64), rel=0.15)


def test_a_basis_of_any_size_is_made_column_by_column() -> None:
    from scipy.fft import dct

    b = OrthogonalAdaptation(rank=6, concept=3)._columns(50_000, "x").double().numpy()
    np.testing.assert_allclose(b.T @ b, np.eye(6), atol=1e-6)
    small = np.concatenate([OrthogonalAdaptation(rank=3, concept=i, columns="disjoint")._columns(9, "x").numpy() for i in range(3)], 1)
    signs = np.sign(small[:, 0])
    np.testing.assert_allclose(signs[:, None] * small, dct(np.eye(9), axis=0, norm="ortho").T, atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(exapt.InputError, match="concept is -1; number the concepts from 0"):
        exapt.attach(nn.Linear(8, 4), OrthogonalAdaptation(rank=2, concept=-1), where="all")
    with pytest.raises(exapt.InputError, match="the 8 inputs hold 4 disjoint concepts of rank 2"):
        exapt.attach(nn.Linear(8, 4), OrthogonalAdaptation(rank=2, concept=4, columns="disjoint"), where="all")
    with pytest.raises(exapt.InputError, match=r"orthogonal_adaptation\.rank is 9"):
        exapt.attach(nn.Linear(8, 4), OrthogonalAdaptation(rank=9), where="all")
