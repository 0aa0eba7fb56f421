"""PESF-KD against NumPy, and on digits: a smoother teacher, a frozen one, and a student that is no worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from da_steps import seen, step
from sklearn.datasets import load_digits
from torch import Tensor, nn

import exapt
from exapt.core.objective import Shapes
from exapt.objectives.pesf_kd import PESFKD, sharpness
from exapt.train import FitConfig
from exapt.train.tasks import ImageClassification


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_against_numpy_and_who_gets_gradients() -> None:
    z, z_t, h_t, y = drawn(6, 4), drawn(6, 4, seed=1).requires_grad_(), drawn(6, 5, seed=2), torch.tensor([0, 1, 2, 3, 0, 1])
    o = PESFKD(teacher=lambda s: (z_t, h_t), width=5, hidden=3, alpha=0.7, temperature=4.0)
    parts = o.parts(Shapes(features=9, classes=4)).double()
    assert [tuple(p.shape) for p in parts.parameters()] == [(4, 5), (4,), (3, 4), (3,), (4, 3), (4,)]
    free = z.clone().requires_grad_()
    found = o.loss(step(seen(free, drawn(6, 9), y), parts=parts))
    w = [p.detach().numpy() for p in parts.parameters()]
    inner = (h_t.numpy() @ w[0].T + w[1]) @ w[2].T + w[3]
    adapted = z_t.detach().numpy() + np.maximum(inner, 0) @ w[4].T + w[5]
    p, q = softmax(adapted / 4), softmax(z.numpy() / 4)
    expected = 0.7 * 16 * (p * np.log(p / q)).sum() / 6
    expected -= sum(np.log(softmax(x)[range(6), y.numpy()]).mean() for x in (z.numpy(), adapted))
    assert found.item() == pytest.approx(expected)
    found.backward()
    assert z_t.grad is None, "the teacher is frozen"
    assert free.grad is not None
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parts.parameters())


def test_sharpness() -> None:
    z = drawn(5, 3)
    centred = z.numpy() - z.numpy().mean(1, keepdims=True)
    np.testing.assert_allclose(sharpness(z).numpy(), np.log(np.exp(centred).sum(1)))
    assert bool((sharpness(3 * z) > sharpness(z)).all())


def test_bad_input() -> None:
    with pytest.raises(exapt.InputError, match="must be positive"):
        PESFKD(temperature=0)
    o = PESFKD(teacher=lambda s: (drawn(6, 4), drawn(6, 7)))
    with pytest.raises(exapt.InputError, match=r"features \(6, 7\); logits \(6, 4\) and features \(6, 9\) are asked for"):
        o.loss(step(seen(drawn(6, 4), drawn(6, 9), torch.zeros(6, dtype=torch.long)), parts=nn.Identity()))


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def rows(start: int, stop: int) -> list[dict[str, object]]:
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x[start:stop], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return [{"image": i, "label": int(t)} for i, t in zip(images, y[start:stop], strict=True)]


def test_the_sharpness_gap_narrows_on_digits() -> None:
    task = ImageClassification(tuple(map(str, range(10))))
    config = FitConfig(steps=160, batch_size=64, lr=1e-2, progress=False)
    teacher = exapt.fit(network(256, 0), task, rows(0, 1000), config=config).model.eval()
    kept = {k: t.clone() for k, t in teacher.state_dict().items()}

    def taught(s: object) -> tuple[Tensor, Tensor]:
        h = teacher[:3](s.batch["inputs"])  # type: ignore[attr-defined, index]
        return teacher[3](h), h  # type: ignore[index]

    student = network(16, 1)
    result = exapt.fit(student, task, source=rows(0, 1000), objective=PESFKD(teacher=taught, width=256), config=config)
    assert all(torch.equal(kept[k], t) for k, t in teacher.state_dict().items())
    x = torch.stack([r["image"] for r in rows(0, 1000)])  # type: ignore[misc]
    with torch.no_grad():
        h = teacher[:3](x)  # type: ignore[index]
        z_t, z_s = teacher[3](h), student(x)  # type: ignore[index]
        adapted = z_t + result.parts(h)  # type: ignore[misc]
    plain, gap = ((sharpness(z).mean() - sharpness(z_s).mean()).item() for z in (z_t, adapted))
    accuracy = float(exapt.evaluate(student, task, rows(1000, 1797))["accuracy"])
    assert abs(gap) < abs(plain)
    assert accuracy > 0.8
