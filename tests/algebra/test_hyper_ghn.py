"""GHN-2: its graph, messages and decoder in NumPy, and parameters for digits networks that it never saw."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor, nn

from exapt.algebra.hyper.ghn import PRIMITIVES, Architecture, GraphHyperNetwork, architecture
from exapt.core.errors import InputError


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.n(self.a(x)))
        return self.head((h + self.b(h)).mean((2, 3)))


def test_the_graph_of_a_network() -> None:
    graph = architecture(Residual())
    assert graph.kinds == ("input", "conv", "norm", "relu", "depthwise conv", "add", "mean", "linear", "output")
    found = {(int(i), int(j)) for i, j in zip(*np.nonzero(graph.edges), strict=True)}
    assert found == {(0, 1), (1, 2), (2, 3), (3, 4), (3, 5), (4, 5), (5, 6), (6, 7), (7, 8)}
    assert {n: s for own in graph.shapes for n, s in own.items()} == {n: tuple(p.shape) for n, p in Residual().named_parameters()}


def mlp(module: nn.Sequential, h: np.ndarray) -> np.ndarray:
    w = {k: v.detach().numpy() for k, v in module.named_parameters()}
    return w["2.weight"] @ np.maximum(w["0.weight"] @ h + w["0.bias"], 0) + w["2.bias"]


def gru(cell: nn.GRUCell, m: np.ndarray, h: np.ndarray) -> np.ndarray:
    w = {k: v.detach().numpy() for k, v in cell.named_parameters()}
    a, b = np.split(w["weight_ih"] @ m + w["bias_ih"], 3), np.split(w["weight_hh"] @ h + w["bias_hh"], 3)
    reset, update = expit(a[0] + b[0]), expit(a[1] + b[1])
    return (1 - update) * np.tanh(a[2] + reset * b[2]) + update * h


@pytest.mark.parametrize("max_path", [1, 2, 50])
def test_messages_along_edges_and_shortest_paths(max_path: int) -> None:
    ghn, graph = GraphHyperNetwork(width=6, channels=4, kernel=3, max_path=max_path), architecture(Residual())
    n = len(graph.kinds)
    h = []
    for kind, own in zip(graph.kinds, graph.shapes, strict=True):
        sizes = np.zeros(4)
        for i, k in enumerate(max(own.values(), key=math.prod, default=())):
            sizes[i] = np.log(k + 1)
        w = ghn.shape
        h.append(ghn.kind.weight[PRIMITIVES.index(kind)].detach().numpy() + w.weight.detach().numpy() @ sizes + w.bias.detach().numpy())
    paths = np.full((n, n), np.inf)  # by matrix powers
    power = np.eye(n)
    for s in range(1, n):
        power = power @ graph.edges
        paths[(power > 0) & np.isinf(paths)] = s
    for order, distance in ((range(n), paths), (reversed(range(n)), paths.T)):
        for v in order:
            m = np.zeros(6)
            for u in range(n):
                s = distance[u, v]
                if s <= max_path:
                    m += mlp(ghn.message, h[u]) if s == 1 else mlp(ghn.virtual, h[u]) / s
            h[v] = gru(ghn.gru, m, h[v])
    np.testing.assert_allclose(ghn.states(graph).detach().numpy(), np.stack(h), rtol=1e-4, atol=1e-5)


def test_tensors_are_tiled_cut_and_normalised() -> None:
    ghn = GraphHyperNetwork(width=6, channels=4, kernel=5)
    kinds = ("conv", "depthwise conv", "norm", "linear")
    shapes = ({"c": (6, 9, 3, 3), "c_b": (6,)}, {"d": (6, 1, 1, 5)}, {"n.weight": (9,), "n.bias": (9,)}, {"l": (3, 10)})
    graph = Architecture(kinds, np.eye(4, k=1, dtype=bool), shapes)
    made = {k: t.detach().numpy() for k, t in ghn(graph).items()}
    h = ghn.norm(ghn.states(graph)).detach()
    for i, (name, shape, beta) in enumerate((("c", (6, 9, 3, 3), 2), ("d", (6, 1, 1, 5), 1), ("", (), 0), ("l", (3, 10, 1, 1), 2))):
        if not name:
            continue
        with torch.no_grad():
            whole = ghn.matrix(ghn.spread(h[i]).view(1, -1, 5, 5)).view(4, 4, 5, 5).numpy()
        expected = np.empty(shape)
        for a, b in np.ndindex(shape[:2]):
            top, left = (5 - shape[2]) // 2, (5 - shape[3]) // 2
            expected[a, b] = whole[a % 4, b % 4, top : top + shape[2], left : left + shape[3]]
        expected *= np.sqrt(beta / np.prod(shape[1:]))
        np.testing.assert_allclose(made[name], expected.reshape(made[name].shape), rtol=1e-4, atol=1e-6)
    vectors = ghn.vectors(h).detach().numpy().reshape(4, 2, 4)
    np.testing.assert_allclose(made["n.weight"], 2 * expit(np.tile(vectors[2, 0], 3)[:9] / 2), rtol=1e-5)
    np.testing.assert_allclose(made["n.bias"], np.tanh(0.2 * np.tile(vectors[2, 1], 3)[:9]), rtol=1e-5)
    np.testing.assert_allclose(made["c_b"], np.tanh(0.2 * np.tile(vectors[0, 1], 2)[:6]), rtol=1e-5)


def network(widths: tuple[int, ...]) -> nn.Sequential:
    sizes, layers = (64, *widths, 10), []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([nn.LayerNorm(b), nn.ReLU()] if i < len(widths) else [])
    return nn.Sequential(*layers)


@pytest.mark.slow
def test_networks_that_were_never_trained_tell_digits(data: Path) -> None:
    """Trained on nets of some widths and depths, it predicts parameters for others that work far above chance (real digits, 8x8)."""
    with np.load(data / "mnist" / "mnist.npz") as f:
        x = torch.tensor(f["x_train"][:3000], dtype=torch.float32)[:, 2:26, 2:26].reshape(-1, 8, 3, 8, 3).mean((2, 4)).flatten(1) / 255
        y = torch.tensor(f["y_train"][:3000], dtype=torch.long)
    torch.manual_seed(0)
    seen, unseen = [(16,), (32,), (24,), (16, 16), (32, 24), (24, 32), (12, 16)], [(28,), (20, 28), (20, 24, 16)]
    ghn = GraphHyperNetwork(width=16, channels=32)
    nets = {w: (network(w), architecture(network(w))) for w in (*seen, *unseen)}
    optimiser = torch.optim.Adam(ghn.parameters(), lr=3e-3)
    for step in range(150):
        rows = torch.randint(2500, (128,))
        losses = []
        for k in range(4):  # a meta-batch
            net, graph = nets[seen[(4 * step + k) % len(seen)]]
            losses.append(nn.functional.cross_entropy(torch.func.functional_call(net, ghn(graph), x[rows]), y[rows]))
        optimiser.zero_grad()
        torch.stack(losses).mean().backward()
        optimiser.step()
    with torch.no_grad():
        for w in unseen:
            net, graph = nets[w]
            accuracy = float((torch.func.functional_call(net, ghn(graph), x[2500:]).argmax(1) == y[2500:]).float().mean())
            assert accuracy > 0.25, (w, accuracy)


def test_what_it_refuses() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.w

    with pytest.raises(InputError, match="w: this parameter belongs to no layer"):
        architecture(Loose())
    with pytest.raises(InputError, match="3x3 is larger than kernel=1"):
        GraphHyperNetwork(width=8)(architecture(Residual()))
    with pytest.raises(InputError, match="at least 1"):
        GraphHyperNetwork(width=0)
