"""OASIS's pre-training: partners, both steps' losses, anchors and the border against NumPy; a fit on imbalanced digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from da_steps import config, images, model, seen, step
from scipy.stats import chi2
from torch import Tensor, nn

import exapt
from exapt.core.objective import Objective, Step
from exapt.objectives.oasis_pretraining import OASISPretraining, borderline, partners, rare_first
from exapt.train import FitConfig
from exapt.train.adapt import ObjectiveLoop
from exapt.train.tasks import ImageClassification

CLASSES = 3


def cross_entropy(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]


def batch(n: int = 12, d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, CLASSES, generator=g), 2 * torch.randn(n, d, generator=g), torch.tensor([0] * (n - 4) + [1, 1, 1, 2])


def test_partners_are_drawn_as_was_asked() -> None:
    y, psi = torch.tensor([0, 0, 0, 0, 1, 1, 2]), rare_first(torch.tensor([0.6, 0.3, 0.1]))
    np.testing.assert_allclose(psi, np.array([0.4, 0.7, 0.9]) / 2)
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([partners(y, psi, g) for _ in range(8000)]).numpy()
    for i in range(7):
        there = [c for c in range(3) if ((y.numpy() == c) & (np.arange(7) != i)).any()]
        for j in range(7):
            rows = ((y.numpy() == y[j].item()) & (np.arange(7) != i)).sum()
            share = 0.0 if i == j else psi[y[j]].item() / sum(psi[c].item() for c in there) / rows
            assert (drawn[:, i] == j).mean() == pytest.approx(share, abs=0.02)
    assert partners(torch.tensor([2]), psi, g).tolist() == [0]


def test_the_first_step_by_hand() -> None:
    z, h, y = batch()
    frequency = torch.tensor([0.7, 0.2, 0.1])
    memory = {"passes": torch.tensor(1), "frequency": frequency}
    found = OASISPretraining(weight=0.3, margin=4.0).loss(step(seen(z, h, y), memory=memory))
    j = partners(y, rare_first(frequency), torch.Generator().manual_seed(0)).numpy()  # the same draws
    ce, apart = cross_entropy(z.numpy(), y.numpy()), np.linalg.norm(h.numpy() - h.numpy()[j], axis=1)
    same = y.numpy() == y.numpy()[j]
    assert 0 < same.sum() < len(y)
    lost = np.where(same, apart, np.maximum(0, 4.0 - apart))
    assert (lost == 0).any()
    assert float(found) == pytest.approx((0.3 * (ce + ce[j]) + 0.7 * lost).mean(), rel=1e-5)


def test_border_and_anchors_by_hand() -> None:
    rng, d, ridge = np.random.default_rng(0), 4, 0.02
    y = np.array([0] * 60 + [1] * 40 + [3])
    h = rng.standard_t(3, size=(101, d)) + 3 * y[:, None]
    covs = {c: np.cov(h[y == c].T, bias=True) for c in (0, 1)}
    covs[3] = (covs[0] + covs[1]) / 2
    squared = np.zeros(101)
    for i in range(101):
        away = h[i] - h[y == y[i]].mean(0)
        squared[i] = away @ np.linalg.solve(covs[y[i]] + ridge * np.trace(covs[y[i]]) / d * np.eye(d), away)
    by_hand = squared > chi2.ppf(chi2.cdf(3.0**2, 1), d)
    at_border, anchors = borderline(torch.tensor(h), torch.tensor(y), 4, 3.0, ridge)
    assert 0 < by_hand.sum() < 20
    np.testing.assert_array_equal(at_border, by_hand)
    assert anchors.tolist() == [squared[:60].argmin(), 60 + squared[60:100].argmin(), -1, 100]
    one, _ = borderline(torch.tensor(h[:, :1]), torch.tensor(y), 4, 3.0, 1e-9)
    for c in (0, 1):
        x = h[y == c, 0]
        np.testing.assert_array_equal(one[torch.tensor(y == c)], np.abs(x - x.mean()) > 3 * x.std())


def test_the_second_step_by_hand() -> None:
    z, h, y = batch()
    head = nn.Linear(4, CLASSES)
    index, border, anchors = torch.arange(12) + 3, torch.zeros(20, dtype=torch.bool), torch.randn(CLASSES, 4)
    border[[4, 5, 12, 14, 18]] = True  # of the batch: rows 1, 2, 9, 11
    memory = {"passes": torch.tensor(2), "border": border, "anchors": anchors}
    at = step(seen(z, h.requires_grad_(), y, index), head=head, memory=memory)
    found = OASISPretraining(weight=0.3).loss(at)
    rows = [1, 2, 9, 11]
    kinds = y[rows].numpy()
    a = anchors.numpy()[kinds]
    with torch.no_grad():
        ce = cross_entropy(head(torch.tensor(a)).numpy(), kinds) + cross_entropy(z[rows].numpy(), kinds)
    apart = np.linalg.norm(a - h.detach().numpy()[rows], axis=1)
    assert float(found.detach()) == pytest.approx((0.3 * ce + 0.7 * apart).mean(), rel=1e-5)
    found.backward()
    assert bool(head.weight.grad.any())  # type: ignore[union-attr]
    assert h.grad[rows].abs().sum(1).min() > 0  # type: ignore[index]
    assert not h.grad[[0, 3, 4]].any()  # type: ignore[index]
    border[:] = False
    z.requires_grad_()
    nothing = OASISPretraining().loss(step(seen(z, h, y, index), head=head, memory=memory))
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert not z.grad.any()  # type: ignore[union-attr]


def test_passes_alternate_in_a_fit() -> None:
    noted: list[dict[str, Tensor]] = []

    class Noted(OASISPretraining):
        def before_epoch(self, s: Step) -> None:
            super().before_epoch(s)
            noted.append({k: t.clone() for k, t in s.memory.items()})
            if self._refining(s):
                rows = list(s.sources())
                h, y, index = torch.cat([x.h for x in rows]), torch.cat([x.labels for x in rows]), torch.cat([x.index for x in rows])
                at_border, anchors = borderline(h, y, 2, self.border, self.ridge)
                assert torch.equal(s.memory["border"][index], at_border)
                torch.testing.assert_close(s.memory["anchors"], h[anchors])

    m = model()
    rows = images(40)[:31]
    exapt.fit(m, ImageClassification(("a", "b")), source=rows, objective=Noted(border=1.0), config=config(steps=12))
    assert [int(x["passes"]) for x in noted] == [1, 2, 3]
    torch.testing.assert_close(noted[0]["frequency"], torch.tensor([16 / 31, 15 / 31]))
    assert "border" not in noted[0]
    assert 0 < int(noted[1]["border"].sum()) < 31
    assert torch.equal(noted[1]["border"], noted[2]["border"])


def test_stopped_and_resumed_in_the_second_pass(tmp_path: Path) -> None:
    def run(folder: Path, resume: bool) -> dict[str, Tensor]:
        m = model()
        whole = config(steps=11, folder=str(folder), save_every=3, resume=resume)
        objective = OASISPretraining(border=1.0)
        exapt.fit(m, ImageClassification(("a", "b")), source=images(40), objective=objective, method=exapt.LoRA(rank=2), where="linear", config=whole)
        return {k: v.detach().clone() for k, v in exapt.trainable(m).items()}

    whole = run(tmp_path / "whole", False)
    with pytest.MonkeyPatch.context() as patch:
        one = ObjectiveLoop.one

        def stop(self: ObjectiveLoop, group: list[Any], total: int) -> None:
            if self.step == 7:
                raise KeyboardInterrupt
            one(self, group, total)

        patch.setattr(ObjectiveLoop, "one", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", False)
    again = run(tmp_path / "cut", True)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"weight": 1.2}, "weight is 1.2"), ({"margin": -1.0}, "margin is -1.0"), ({"border": 0.0}, "border 0.0"), ({"ridge": 0.0}, "ridge 0.0")],
)
def test_bad_fields(fields: dict[str, float], said: str) -> None:
    with pytest.raises(exapt.InputError, match=f"^OASISPretraining: .*{said}") as e:
        OASISPretraining(**fields)
    assert "\n" not in str(e.value)


def test_rows_that_cannot_be_paired() -> None:
    one = seen(torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(exapt.InputError, match="OASISPretraining needs labelled rows of two classes at least"):
        OASISPretraining().before_epoch(step(sources=lambda: [one]))
    with pytest.raises(exapt.InputError, match="labelled rows of two classes at least, one of them with two rows"):
        borderline(torch.zeros(2, 3), torch.tensor([0, 1]), 2, 3.0, 0.01)
    several = seen(torch.zeros(4, 2), torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(exapt.InputError, match="one prediction for each row"):
        OASISPretraining().before_epoch(step(sources=lambda: [several]))


def recall(objective: Objective | None, epochs: int, seed: int) -> float:
    """Recall of the rare digits of a network on digits of which the even ones are rare."""
    datasets = pytest.importorskip("sklearn.datasets")
    raw = datasets.load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(raw.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(raw.target)[order]
    held = [i for c in range(10) for i in (y[:900] == c).nonzero()[: 6 if c % 2 == 0 else None, 0].tolist()]
    rows = [{"image": x[i], "label": int(y[i])} for i in held]
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    settings = FitConfig(epochs=epochs, batch_size=32, lr=3e-3, progress=False, seed=seed)
    given = {"data": rows} if objective is None else {"source": rows, "objective": objective}
    exapt.fit(m, ImageClassification(tuple(map(str, range(10)))), config=settings, **given)  # type: ignore[arg-type]
    with torch.no_grad():
        right = m(x[900:]).argmax(1) == y[900:]
    return float(right[y[900:] % 2 == 0].float().mean())


def test_rare_digits_are_learned_sooner() -> None:
    """In as many passes over all rows as cross-entropy has, and as many at the border. With as many passes in all, cross-entropy is ahead."""
    plain, paired = (np.mean([recall(o, epochs, seed) for seed in (0, 1)]) for o, epochs in ((None, 10), (OASISPretraining(), 20)))
    assert paired > plain + 0.15
