"""Knowledge Concentration against NumPy, and specialists of digits in one student."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from da_steps import seen, step
from sklearn.datasets import load_digits
from torch import Tensor, nn

import exapt
from exapt.core.objective import Shapes
from exapt.objectives.knowledge_concentration import KnowledgeConcentration, paced
from exapt.train import FitConfig
from exapt.train.tasks import ImageClassification

VERTICALS = ((4, 0, 2), (1, 3))


@pytest.mark.parametrize("self_paced", [True, False])
@pytest.mark.parametrize("top", [1, 2, 100])
def test_against_numpy(top: int, self_paced: bool) -> None:
    r = np.random.default_rng(0)
    z, y = r.normal(size=(7, 5)), r.integers(0, 5, 7)
    answers = [r.normal(size=(7, len(v))) for v in VERTICALS]
    o = KnowledgeConcentration(VERTICALS, tuple(lambda s, a=a: torch.tensor(a, requires_grad=True) for a in answers), top, self_paced)
    parts = o.parts(Shapes(features=3, classes=5)).double()
    np.testing.assert_allclose(parts.gamma.detach().numpy(), np.sqrt([3, 2]), rtol=1e-6)  # type: ignore[union-attr]
    with torch.no_grad():
        parts.gamma.copy_(torch.tensor([2.0, 0.5]))  # type: ignore[operator, union-attr]
    total = 0.0
    for i in range(7):
        v = next(k for k, classes in enumerate(VERTICALS) if y[i] in classes)
        soft = np.zeros(5)
        p = 1 / (1 + np.exp(-answers[v][i]))
        for place in np.argsort(-p)[:top]:
            soft[VERTICALS[v][place]] = p[place]
        x = z[i].copy()
        for classes, gamma in zip(VERTICALS, (2.0, 0.5), strict=True):
            if self_paced:
                x[list(classes)] *= gamma / np.linalg.norm(z[i][list(classes)])
        q = 1 / (1 + np.exp(-x))
        total -= (soft * np.log(q) + (1 - soft) * np.log(1 - q)).sum()
    found = o.loss(step(seen(torch.tensor(z), labels=torch.tensor(y)), parts=parts))
    assert found.item() == pytest.approx(total / 7)
    if self_paced:
        found.backward()
        assert bool((parts.gamma.grad != 0).all())  # type: ignore[union-attr]


def test_bad_input() -> None:
    shapes = Shapes(features=3, classes=5)
    with pytest.raises(exapt.InputError, match="0 teachers for 2 verticals"):
        KnowledgeConcentration(VERTICALS)
    with pytest.raises(exapt.InputError, match="needs specialists"):
        KnowledgeConcentration().parts(shapes)
    wrong = KnowledgeConcentration(((0, 1), (1, 2, 3, 4)), (lambda s: s.logits,) * 2)
    with pytest.raises(exapt.InputError, match="each of the 5 classes once"):
        wrong.parts(shapes)
    o = KnowledgeConcentration(VERTICALS, (lambda s: s.logits,) * 2)
    with pytest.raises(exapt.InputError, match=r"teacher 0 gives \(2, 5\); \(2, 3\) is asked for"):
        o.loss(step(seen(torch.zeros(2, 5), labels=torch.tensor([0, 2])), parts=o.parts(shapes)))


def network(classes: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))


def specialist(classes: tuple[int, ...], x: Tensor, y: Tensor) -> nn.Module:
    """Gradient descent on sigmoids."""
    model, places = network(len(classes), classes[0]), torch.tensor([classes.index(int(k)) for k in y])
    goal = nn.functional.one_hot(places, len(classes)).float()
    for _ in range(150):
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), goal, reduction="sum") / len(x)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.sub_(0.5 * g)
    return model.eval()


def test_two_specialists_of_digits_in_one_student() -> None:
    images, target = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(target)
    verticals = ((0, 1, 2, 3, 4, 5), (6, 7, 8, 9))
    members = [torch.tensor([int(k) in v for k in y[:1000]]) for v in verticals]
    experts = [specialist(v, x[:1000][m], y[:1000][m]) for v, m in zip(verticals, members, strict=True)]
    teachers = tuple(lambda s, e=e: e(s.batch["inputs"]) for e in experts)
    rows = [{"image": i, "label": int(k)} for i, k in zip(x, y, strict=True)]
    task, student = ImageClassification(tuple(map(str, range(10)))), network(10, 3)
    config = FitConfig(steps=150, batch_size=64, lr=1e-2, progress=False)
    o = KnowledgeConcentration(verticals, teachers, part_rate=3.0)
    result = exapt.fit(student, task, source=rows[:1000], objective=o, config=config)
    with torch.no_grad():
        z = student(x[1000:])
        trained = paced(z, result.parts.member, result.parts.gamma)  # type: ignore[union-attr, arg-type]
    right = [float((t.argmax(1) == y[1000:]).float().mean()) for t in (z, trained)]
    assert right[1] > 0.85
    assert bool((result.parts.gamma > torch.tensor([6.0, 4.0]).sqrt()).all())  # type: ignore[union-attr, operator]
