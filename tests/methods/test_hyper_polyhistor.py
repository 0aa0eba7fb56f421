"""Polyhistor against its formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import exapt
from exapt.methods.polyhistor import Polyhistor


def stages() -> nn.Sequential:
    """Two layers of one width, one twice as wide, as a hierarchical transformer's stages."""
    return nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 16)).double()


@pytest.mark.parametrize("lite", [True, False])
def test_against_its_formulas(lite: bool) -> None:
    model = exapt.attach(stages(), Polyhistor(n_tasks=3, reduction=4, rank=2, lite=lite, embedding=5, activation="tanh"), where="?")
    p: dict[str, dict[str, np.ndarray]] = {"shared": {}, "0": {}, "1": {}, "2": {}}
    with torch.no_grad():
        for name, t in exapt.trainable(model).items():
            t.copy_(torch.randn_like(t))
            p[name[0] if name[0].isdigit() else "shared"][name.rpartition(".")[2]] = t.numpy().astype(float)
    x, ids = torch.randn(4, 3, 5, dtype=torch.double), torch.tensor([2, 0, 1, 2])
    expected = x.numpy()
    for i, layer in enumerate(model):
        own = {**p["shared"], **p[str(i)]}
        h = expected @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        rows = []
        for row, task in zip(h, ids.tolist(), strict=True):
            matrices = []
            for which in ("D", "U"):
                alpha, beta = ((own[f"H_{k}_{which}"] @ own["z"][task]).reshape(-1, 2) for k in ("a", "b"))
                template = alpha @ beta.T
                matrices.append(np.kron(own[f"S_{which}"], template) if lite else template)
            rows.append(row + np.tanh(row @ matrices[0].T) @ matrices[1].T)
        expected = np.stack(rows)
    np.testing.assert_allclose(model(x, task_ids=ids).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_parameters_that_the_lite_form_saves() -> None:
    count = {lite: exapt.parameter_count(exapt.attach(stages(), Polyhistor(reduction=4, rank=2, lite=lite), where="?")).trainable for lite in (True, False)}
    d, m, r, e = 8, 2, 2, 64
    assert count[True] == e + 2 * (d + m) * r * e + 2 * (1 + 1 + 4)
    assert count[False] == e + 2 * ((8 + 2) + (8 + 2) + (16 + 4)) * r * e


def test_what_it_refuses() -> None:
    with pytest.raises(exapt.InputError, match="no multiple of 8"):
        exapt.attach(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 12)), Polyhistor(reduction=2), where="?")
    model = exapt.attach(stages(), Polyhistor(n_tasks=2, reduction=4), where="?")
    with pytest.raises(exapt.InputError, match="it has 2 tasks"):
        model(torch.zeros(1, 3, 5, dtype=torch.double), task_ids=torch.tensor([2]))
