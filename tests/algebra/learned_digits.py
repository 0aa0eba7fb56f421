"""A small classifier of digits and experts fine-tuned from it, one for each of three domains; for the tests of learned merges."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

DOMAINS = ("upright", "quarter turn", "mirrored")


@functools.cache
def digits() -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each domain training images, labels, test images, labels; images (n, 64)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = found.images / 16
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1000], order[1000:]
    domains = (images, np.rot90(images, axes=(1, 2)), images[:, :, ::-1])
    made = {}
    for name, x in zip(DOMAINS, domains, strict=True):
        flat, y = torch.tensor(np.ascontiguousarray(x).reshape(-1, 64), dtype=torch.float32), torch.tensor(found.target)
        made[name] = (flat[train], y[train], flat[test], y[test])
    return made


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


def trained(start: dict[str, Tensor], x: Tensor, y: Tensor, steps: int, lr: float, seed: int) -> dict[str, Tensor]:
    model = network()
    model.load_state_dict(start)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {k: t.detach().clone() for k, t in model.state_dict().items()}


@functools.cache
def experts() -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
    """A base that saw a little of all domains, and one expert for each."""
    torch.manual_seed(0)
    start = network().state_dict()
    sets = list(digits().values())
    x, y = torch.cat([s[0][:100] for s in sets]), torch.cat([s[1][:100] for s in sets])
    base = trained(start, x, y, 150, 3e-3, 0)
    return base, tuple(trained(base, s[0], s[1], 120, 2e-3, i + 1) for i, s in enumerate(sets))


def accuracy(tensors: dict[str, Tensor], domain: str) -> float:
    _, _, x, y = digits()[domain]
    with torch.no_grad():
        out = torch.func.functional_call(network(), tensors, (x,))
    return float((out.argmax(1) == y).float().mean())
