"""Federated averages of adapters: NumPy, and exactness of what is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exapt.algebra.federated import federated_average, federated_pad, federated_stack, self_pruned, tail_norm, truncated
from exapt.core.errors import InputError


def lora(rank: int, seed: int, sites: tuple[str, ...] = ("q/", "v/")) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, 5), "B": (4, rank)}
    return {s + k: torch.randn(shape, generator=g, dtype=torch.double) for s in sites for k, shape in shapes.items()}


def test_the_average_weighs_rows() -> None:
    clients, rows = [lora(2, i) for i in range(3)], [10, 30, 60]
    merged = federated_average(clients, rows)
    for name, t in merged.items():
        np.testing.assert_allclose(t, sum(n / 100 * c[name].numpy() for n, c in zip(rows, clients, strict=True)), rtol=1e-12)


def test_stacking_is_the_exact_mean_of_updates_of_any_rank_and_averaging_factors_is_not() -> None:
    ranks, rows, scales = [1, 2, 4], [5, 3, 2], [2.0, 1.0, 0.5]
    clients = [lora(r, i) for i, r in enumerate(ranks)]
    merged = federated_stack(clients, rows, scales)
    for s in ("q/", "v/"):
        assert merged[s + "A"].shape == (7, 5)
        exact = sum(n / 10 * f * c[s + "B"].numpy() @ c[s + "A"].numpy() for n, f, c in zip(rows, scales, clients, strict=True))
        np.testing.assert_allclose(merged[s + "B"] @ merged[s + "A"], exact, rtol=1e-10, atol=1e-12)
        padded = federated_pad(clients, rows)
        assert np.abs((padded[s + "B"] @ padded[s + "A"]).numpy() - exact).max() > 0.1


def test_padding_by_hand_and_by_the_norms_of_updates() -> None:
    clients = [lora(1, 0), lora(3, 1)]
    norms = [np.sqrt(sum(np.linalg.norm(c[s + "B"].numpy() @ c[s + "A"].numpy()) ** 2 for s in ("q/", "v/"))) for c in clients]
    w = np.array(norms) / sum(norms)
    merged = federated_pad(clients)
    expected = w[1] * clients[1]["q/A"].numpy()
    expected[:1] += w[0] * clients[0]["q/A"].numpy()
    np.testing.assert_allclose(merged["q/A"], expected, rtol=1e-10)
    back = truncated(merged, 1)
    np.testing.assert_allclose(back["q/A"], expected[:1], rtol=1e-10)
    assert back["v/B"].shape == (4, 1)
    same = federated_pad([clients[1], clients[1]], [1, 5])
    torch.testing.assert_close(same, clients[1])


def test_self_pruning_cuts_tails_that_shrank_only() -> None:
    before = lora(4, 0)
    after = {k: t.clone() for k, t in before.items()}
    after["q/A"][3:] *= 0.1
    after["v/A"][3:] *= 2
    cut = self_pruned(before, after, keep=0.75)
    assert len(cut["q/A"]) == 3
    assert len(cut["v/A"]) == 4
    torch.testing.assert_close(cut["q/B"], after["q/B"][:, :3])
    np.testing.assert_allclose(
        float(tail_norm(before["q/A"], before["q/B"], 0.5)), np.linalg.norm(before["q/A"][2:]) * np.linalg.norm(before["q/B"][:, 2:]), rtol=1e-10
    )


def test_a_federation_with_exact_aggregation_fits_what_one_client_alone_cannot() -> None:
    """Clients of rank 1 and 2 see different inputs of one rank-3 map; rounds of stacking reach it."""
    g = torch.Generator().manual_seed(0)
    target = torch.randn(4, 3, generator=g) @ torch.randn(3, 6, generator=g) / 3
    seen = [torch.randn(40, 6, generator=g), torch.randn(60, 6, generator=g)]
    base = torch.zeros(4, 6)
    losses = []
    for _ in range(8):
        clients = []
        for rank, x in zip((1, 2), seen, strict=True):
            a, b = (torch.randn(rank, 6, generator=g) / 6**0.5).requires_grad_(), torch.zeros(4, rank, requires_grad=True)
            optimiser = torch.optim.Adam([a, b], lr=0.05)
            for _ in range(60):
                optimiser.zero_grad()
                ((x @ (base + b @ a - target).T).square().mean()).backward()
                optimiser.step()
            clients.append({"A": a.detach(), "B": b.detach()})
        merged = federated_stack(clients, [len(x) for x in seen])
        base = base + merged["B"] @ merged["A"]
        losses.append(float((base - target).square().mean()))
    assert losses[-1] < 0.02 * float(target.square().mean())
    assert losses[-1] < losses[0]


def test_what_it_refuses() -> None:
    with pytest.raises(InputError, match="no client"):
        federated_average([], [])
    with pytest.raises(InputError, match="none negative"):
        federated_average([lora(1, 0)], [-1])
    with pytest.raises(InputError, match="client 1 has shape"):
        federated_average([lora(1, 0), lora(2, 1)], [1, 1])
    with pytest.raises(InputError, match="must have the same sites"):
        federated_stack([lora(1, 0), lora(1, 0, ("q/",))], [1, 1])
    with pytest.raises(InputError, match="q/gamma is no factor"):
        federated_stack([lora(1, 0) | {"q/gamma": torch.ones(3)}], [1])
    with pytest.raises(InputError, match="do not fit together"):
        federated_stack([lora(1, 0), lora(1, 0) | {"q/A": torch.zeros(1, 9)}], [1, 1])
    with pytest.raises(InputError, match="2 scales for 1 clients"):
        federated_stack([lora(1, 0)], [1], [1.0, 2.0])
    with pytest.raises(InputError, match="keep is 1"):
        self_pruned(lora(2, 0), lora(2, 0), keep=1)
