"""MUSCLE's loss against NumPy, and as an objective."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from da_steps import LABELS, config, images, model, seen, step
from torch import Tensor, nn

import exapt
from exapt.objectives.muscle import MUSCLE, compatible_distillation
from exapt.train.tasks import ImageClassification


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(z: np.ndarray, old: np.ndarray, new: np.ndarray, y: np.ndarray, temperature: float) -> float:
    total, n = 0.0, 0
    for i in np.ndindex(y.shape):
        if y[i] == -100:
            continue
        p = softmax((new if z[i].argmax() == y[i] else old)[i] / temperature)
        q = softmax(z[i] / temperature)
        total, n = total + float((p * np.log(p / q)).sum()), n + 1
    return total / n


@pytest.mark.parametrize("shape", [(9,), (3, 5)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_numpy(shape: tuple[int, ...], temperature: float) -> None:
    r = np.random.default_rng(0)
    z, old, new = (r.normal(size=(*shape, 4)) for _ in range(3))
    y = r.integers(0, 4, shape)
    y.flat[:2] = -100
    free = torch.tensor(z, requires_grad=True)
    teachers = [torch.tensor(t, requires_grad=True) for t in (old, new)]
    found = compatible_distillation(free, *teachers, torch.tensor(y), temperature)
    assert found.item() == pytest.approx(reference(z, old, new, y, temperature))
    found.backward()
    assert free.grad is not None
    assert torch.equal(free.grad[torch.tensor(y) == -100], torch.zeros_like(free.grad[torch.tensor(y) == -100]))
    assert all(t.grad is None for t in teachers)


def test_objective_notes_the_new_model_by_row() -> None:
    r = np.random.default_rng(1)
    table, old = r.normal(size=(6, 3)), r.normal(size=(6, 3))
    y = r.integers(0, 3, 6)
    order = torch.tensor([4, 0, 5, 1, 3, 2])

    def part(rows: Tensor, z: np.ndarray) -> object:
        return seen(torch.tensor(z)[rows], labels=torch.tensor(y)[rows], index=rows)

    o = MUSCLE(old=lambda s: torch.tensor(old)[s.index], task=0.5, temperature=2.0)
    memory: dict[str, Tensor] = {}
    o.before_epoch(step(memory=memory, sources=lambda: (part(order[:4], table), part(order[4:], table))))
    assert torch.equal(memory["new"], torch.tensor(table))
    z, rows = r.normal(size=(6, 3)), torch.tensor([5, 2])
    found = o.loss(step(part(rows, z), memory=memory))
    i = rows.numpy()
    cross = -np.log(softmax(z[i])[range(2), y[i]]).mean()
    assert float(found) == pytest.approx(reference(z[i], old[i], table[i], y[i], 2.0) + 0.5 * cross)
    o.before_epoch(step(memory=memory, sources=lambda: pytest.fail("noted once")))


def test_fit_keeps_the_new_models_answers_where_they_are_right() -> None:
    """With a task adapter attached and an old model that knows nothing, the compatible model answers as the new one where that is right."""
    rows = images(24)
    task = ImageClassification(LABELS)
    m = exapt.fit(model(), task, rows, method=exapt.LoRA(rank=2), config=config(steps=20)).model
    x = torch.stack([r["image"] for r in rows])  # type: ignore[misc]
    before = m(x).detach()
    other = copy.deepcopy(model(5))
    o = MUSCLE(old=lambda s: other(s.batch["inputs"]))
    result = exapt.fit(m, task, source=rows, objective=o, config=config(steps=10))
    assert result.steps == 10
    assert torch.equal(m(x).argmax(1), before.argmax(1))
    assert isinstance(other, nn.Module)
    assert all(p.grad is None for p in other.parameters())


def test_bad_input() -> None:
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(exapt.InputError, match="do not fit"):
        compatible_distillation(z, z[:1], z, y)
    with pytest.raises(exapt.InputError, match="temperature 0"):
        compatible_distillation(z, z, z, y, 0.0)
    with pytest.raises(exapt.InputError, match="must be positive"):
        MUSCLE(temperature=-1)
    with pytest.raises(exapt.InputError, match="needs the model before the update"):
        MUSCLE().loss(step(seen(z, labels=y), memory={"new": z}))
    twice = seen(z, labels=y, index=torch.tensor([1, 1]))
    with pytest.raises(exapt.InputError, match="one prediction for each row"):
        MUSCLE(old=lambda s: z).before_epoch(step(sources=lambda: (twice,)))
