"""G.pt: the diffusion's formulas in NumPy, and an update of unseen parameters in one step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exapt.algebra.hyper.gpt import CheckpointDiffusion, permuted
from exapt.core.errors import InputError


def test_the_schedule_the_noise_and_the_step_back() -> None:
    model = CheckpointDiffusion([3, 5], width=16, layers=1, heads=2, steps=50, piece=4, scale=2.0)
    assert model.pieces == [3, 4, 1]
    beta = np.linspace(1e-4, 0.02, 50) * 20
    np.testing.assert_allclose(model.alpha_bar.numpy(), np.cumprod(1 - beta), rtol=1e-5)
    theta = torch.randn(4, 8)
    # the heads start at zero, so the clean parameters are said to be the present ones, and every sampler ends there
    for steps in (0, 5):
        torch.testing.assert_close(model.sample(theta, torch.zeros(4), torch.zeros(4), steps=steps), theta)
    later = torch.randn(4, 8)
    error = model.objective(theta, torch.zeros(4), later, torch.zeros(4)).item()
    np.testing.assert_allclose(error, (((theta - later) / 2) ** 2).mean().item(), rtol=1e-5)


def test_a_gaussian_posterior_is_sampled_as_the_formula_says() -> None:
    """With the best possible denoiser of a known normal distribution in the network's place, samples have its mean and spread."""
    model = CheckpointDiffusion([2], width=16, layers=1, heads=2, steps=1000)
    mean, spread = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.1])

    def best(x: Tensor, theta: Tensor, loss: Tensor, wanted: Tensor, t: Tensor) -> Tensor:
        a = model.alpha_bar[t][:, None]
        gain = a.sqrt() * spread**2 / (a * spread**2 + 1 - a)
        return mean + gain * (x - a.sqrt() * mean)

    model.forward = best  # type: ignore[method-assign]
    drawn = model.sample(torch.zeros(4000, 2), torch.zeros(4000), torch.zeros(4000))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.06)


def test_permuted_units_are_the_same_function() -> None:
    up, bias, down, x = torch.randn(5, 3), torch.randn(5), torch.randn(2, 5), torch.randn(7, 3)
    new = permuted(up, bias, down, torch.randperm(5))
    torch.testing.assert_close(torch.relu(x @ new[0].T + new[1]) @ new[2].T, torch.relu(x @ up.T + bias) @ down.T)
    assert not torch.equal(new[0], up)


def runs(number: int, x: Tensor, y: Tensor, length: int = 30) -> tuple[Tensor, Tensor]:
    """Checkpoints (number, length, 5) of logistic regressions from random starts, and their losses (number, length)."""
    theta = 1.5 * torch.randn(number, 5)
    checkpoints, losses = [], []
    for _ in range(length):
        logits = theta[:, :4] @ x.T + theta[:, 4:]
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, y.expand(number, -1), reduction="none").mean(1))
        checkpoints.append(theta)
        slope = (logits.sigmoid() - y) / len(y)
        theta = theta - 2.0 * torch.cat([slope @ x, slope.sum(1, keepdim=True)], 1)
    return torch.stack(checkpoints, 1), torch.stack(losses, 1)


@pytest.mark.slow
def test_one_update_takes_unseen_parameters_to_the_loss_that_was_asked_for() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    y = ((x @ torch.tensor([1.0, -2.0, 0.5, 1.0]) + torch.randn(200)) > 0).float()
    checkpoints, losses = runs(200, x, y)
    model = CheckpointDiffusion([4, 1], width=32, layers=2, heads=4, steps=50, scale=float(checkpoints.std()))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(250):
        run, i, j = torch.randint(200, (128,)), torch.randint(30, (128,)), torch.randint(30, (128,))
        loss = model.objective(checkpoints[run, i], losses[run, i], checkpoints[run, j], losses[run, j])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    fresh, start = runs(40, x, y, 30)
    least = float(start[:, -1].mean())
    updated = model.sample(fresh[:, 0], start[:, 0], torch.full((40,), least))

    def score(theta: Tensor) -> float:
        logits = theta[:, :4] @ x.T + theta[:, 4:]
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, y.expand(len(theta), -1)))

    one_step = score(fresh[:, 1])
    assert score(updated) < 0.5 * score(fresh[:, 0])
    assert score(updated) < one_step  # better than one step of the optimiser whose runs it saw
    high = model.sample(fresh[:, 0], start[:, 0], start[:, 0])
    assert score(high) > score(updated)  # the prompt decides


def test_what_it_refuses() -> None:
    with pytest.raises(InputError, match="sizes and piece are at least 1"):
        CheckpointDiffusion([])
