"""Trajectories moved to another start: against brute force in NumPy, and on digits."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from learned_digits import digits
from torch import Tensor, nn

import exapt
from exapt.algebra.transfer.permutation import apply_permutation
from exapt.algebra.transfer.trajectory import linear_trajectory, transferred_trajectory
from exapt.algebra.transfer.units import UnitSpec, sequential_units

SPEC = UnitSpec({"w": ("h", None), "v": (None, "h")})


def gradients(w: np.ndarray, v: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of half the mean squared error of v tanh(w x), by hand."""
    h = np.tanh(x @ w.T)
    e = (h @ v.T - y) / len(x)
    return ((e @ v) * (1 - h**2)).T @ x, e.T @ h


def reference(path: list[tuple[np.ndarray, np.ndarray]], start: tuple[np.ndarray, np.ndarray], rows: list, fast: bool) -> tuple[list[int], int]:
    """Gradient matching along the trajectory with the nearest of all permutations, and how many gradients it takes."""
    n, kept, taken = len(start[0]), [], 0
    perm = list(range(n))

    def moved(t: int) -> tuple[np.ndarray, np.ndarray]:
        return start[0] + (path[t][0] - path[0][0])[perm], start[1] + (path[t][1] - path[0][1])[:, perm]

    for s in range(1, len(path)):
        taken += 1
        for t in range(s - 1, s) if fast else range(s):
            pair = gradients(*moved(t), *rows[t]), gradients(*path[t], *rows[t])
            kept = [*kept, pair] if fast or t else [pair]
            taken += 1
        costs = {}
        for order in itertools.permutations(range(n)):
            p = list(order)
            costs[order] = sum(((a[0] - b[0][p]) ** 2).sum() + ((a[1] - b[1][:, p]) ** 2).sum() for a, b in kept)
        perm = list(min(costs, key=costs.__getitem__))
    return perm, taken


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_against_brute_force(seed: int, fast: bool) -> None:
    r = np.random.default_rng(seed)
    rows = [(r.normal(size=(7, 3)), r.normal(size=(7, 2))) for _ in range(4)]
    w, v = r.normal(size=(4, 3)), r.normal(size=(2, 4))
    path = [(w, v)]
    for t in range(4):
        dw, dv = gradients(*path[-1], *rows[t])
        path.append((path[-1][0] - 2 * dw, path[-1][1] - 2 * dv))
    start = r.normal(size=(4, 3)), r.normal(size=(2, 4))

    def gradient(tensors: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        x, y = map(torch.tensor, rows[t])
        free = {k: p.clone().requires_grad_() for k, p in tensors.items()}
        loss = ((x @ free["w"].T).tanh() @ free["v"].T - y).square().sum() / 2 / len(x)
        return dict(zip(free, torch.autograd.grad(loss, list(free.values())), strict=True))

    trees = [{"w": torch.tensor(a), "v": torch.tensor(b)} for a, b in path]
    found = transferred_trajectory(trees, {"w": torch.tensor(start[0]), "v": torch.tensor(start[1])}, gradient, SPEC, fast=fast)
    perm, taken = reference(path, start, rows, fast)
    assert found.permutations["h"].tolist() == perm
    assert found.gradients == taken == (8 if fast else 14)
    np.testing.assert_allclose(found.tensors["w"].numpy(), start[0] + (path[-1][0] - path[0][0])[perm])
    np.testing.assert_allclose(found.tensors["v"].numpy(), start[1] + (path[-1][1] - path[0][1])[:, perm])


def test_linear_trajectory_is_cosine_or_uniform() -> None:
    first, last = {"w": torch.zeros(2), "n": torch.tensor(4)}, {"w": torch.tensor([1.0, -2.0]), "n": torch.tensor(4)}
    lengths = 1 + np.cos(np.pi * np.arange(5) / 5)
    line = linear_trajectory(first, last, 5)
    np.testing.assert_allclose(np.diff([float(t["w"][0]) for t in line]), lengths / lengths.sum(), rtol=1e-4)
    np.testing.assert_allclose([float(t["w"][1]) for t in linear_trajectory(first, last, 4, pace="uniform")], [0, -0.5, -1, -1.5, -2], rtol=1e-6)
    assert all(int(t["n"]) == 4 for t in line)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))


@functools.cache
def start(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = network()
    for t in model.parameters():
        nn.init.kaiming_normal_(t) if t.dim() > 1 else nn.init.zeros_(t)
    return {k: t.clone() for k, t in model.state_dict().items()}


def loss(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(torch.func.functional_call(network(), tensors, (x,)), y)


def gradient(tensors: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    x, y, _, _ = digits()["upright"]
    rows = torch.randint(len(x), (256,), generator=torch.Generator().manual_seed(t))
    free = {k: p.clone().requires_grad_() for k, p in tensors.items()}
    return dict(zip(free, torch.autograd.grad(loss(free, x[rows], y[rows]), list(free.values())), strict=True))


@functools.cache
def source() -> dict[str, Tensor]:
    """Plain gradient descent from the first start."""
    now = start(0)
    for step in range(100):
        now = {k: t - 0.1 * g for (k, t), g in zip(now.items(), gradient(now, step).values(), strict=True)}
    return now


def accuracy(tensors: dict[str, Tensor]) -> float:
    _, _, x, y = digits()["upright"]
    return float((torch.func.functional_call(network(), tensors, (x,)).argmax(1) == y).float().mean())


def fine_tuned(tensors: dict[str, Tensor], steps: int) -> float:
    for t in range(steps):
        tensors = {k: p - 0.1 * g for (k, p), g in zip(tensors.items(), gradient(tensors, 500 + t).values(), strict=True)}
    return accuracy(tensors)


@pytest.mark.parametrize("fast", [False, True])
def test_digits_are_known_before_any_training(fast: bool) -> None:
    end, other = source(), start(1)
    assert accuracy(end) > 0.9
    line = linear_trajectory(start(0), end, 10)
    found = transferred_trajectory(line, other, gradient, sequential_units(network()), fast=fast).tensors
    naive = {k: other[k] + end[k] - t for k, t in start(0).items()}
    assert accuracy(found) > accuracy(naive) + (0.4 if fast else 0.1), "GMT's gain here is real, but smaller than FGMT's"
    assert fine_tuned(found, 5) > fine_tuned(other, 5) + 0.1


def test_a_permuted_start_gives_the_permuted_end() -> None:
    """If the target is the source with its units in another order, the whole trajectory moves exactly."""
    g = torch.Generator().manual_seed(0)
    path = [{"w": torch.randn(30, 5, generator=g), "v": torch.randn(3, 30, generator=g)} for _ in range(3)]
    order = {"h": torch.randperm(30, generator=g)}
    found = transferred_trajectory(path, apply_permutation(path[0], order, SPEC), lambda p, t: {k: x.sin() for k, x in p.items()}, SPEC)
    assert torch.equal(found.permutations["h"], order["h"])
    for k, t in apply_permutation(path[-1], order, SPEC).items():
        torch.testing.assert_close(found.tensors[k], t)


def test_bad_input() -> None:
    tree = {"w": torch.randn(3, 2), "v": torch.randn(1, 3)}
    with pytest.raises(exapt.InputError, match="1 checkpoints are no trajectory"):
        transferred_trajectory([tree], tree, lambda p, t: p, SPEC)
    with pytest.raises(exapt.InputError, match="w is missing or of another shape in checkpoint 1"):
        transferred_trajectory([tree, {**tree, "w": torch.randn(3, 5)}], tree, lambda p, t: p, SPEC)
    with pytest.raises(exapt.InputError, match='no tensor of permutation "h" has a gradient'):
        transferred_trajectory([tree, tree], tree, lambda p, t: {}, SPEC)
    with pytest.raises(exapt.InputError, match="at step 0 the gradient of w is not finite"):
        transferred_trajectory([tree, tree], tree, lambda p, t: {k: g / 0 for k, g in p.items()}, SPEC)
    with pytest.raises(exapt.InputError, match="0 steps are none"):
        linear_trajectory(tree, tree, 0)
