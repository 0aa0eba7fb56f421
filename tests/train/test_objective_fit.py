"""``fit`` under an objective: sources, targets, domains, frozen passes, resuming."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import exapt
from exapt.core.components import component
from exapt.core.objective import Objective, Seen, Shapes, Step, task_loss
from exapt.objectives.coral import CORAL
from exapt.objectives.dann import DANN
from exapt.train import Custom, FitConfig
from exapt.train.tasks import ImageClassification

LABELS = ("a", "b")


def images(n: int, shift: float = 0.0, seed: int = 0) -> list[dict[str, object]]:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = torch.randn(n, 1, 2, 3, generator=g) * 0.3 + (y * 2.0 - 1).view(-1, 1, 1, 1) + shift
    return [{"image": x[i], "label": int(y[i])} for i in range(n)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def config(**more: object) -> FitConfig:
    return FitConfig(**{"steps": 12, "batch_size": 8, "lr": 1e-2, "progress": False, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [CORAL(), DANN(hidden=4)])
@pytest.mark.parametrize("method", [exapt.LoRA(rank=2), exapt.IA3(), None])
def test_any_objective_with_any_shift(objective: Objective, method: exapt.Method | None) -> None:
    m, where = model(), None if method is None else "linear"
    rows = images(20, 0.5, 1)
    before = exapt.evaluate(m, ImageClassification(LABELS), rows)["loss"]
    data = {"source": images(24), "target": images(18, 0.5)}
    result = exapt.fit(m, ImageClassification(LABELS), objective=objective, method=method, where=where, config=config(steps=40, lr=3e-2), **data)
    assert result.steps == 40
    assert exapt.evaluate(m, ImageClassification(LABELS), rows)["loss"] < before


@component("seen_probe", kind="test-objective")
@dataclass(frozen=True)
class Probe(Objective):
    """Notes what it is shown."""

    setting = "generalisation"

    def parts(self, shapes: Shapes) -> nn.Module:
        LOG.append(shapes)
        return nn.Linear(2, 1)

    def before_epoch(self, s: Step) -> None:
        LOG.append(("epoch", s.step, sum(len(x.logits) for x in s.sources())))

    def loss(self, s: Step) -> torch.Tensor:
        LOG.append(s.s)
        with s.frozen(), torch.no_grad():
            LOG.append(s.run(s.s.batch))
        again = s.run(s.s.batch, {"1": lambda h: h * 0})
        assert torch.equal(s.head(s.s.h), s.s.logits)
        LOG.append(again)
        s.memory["count"] = s.memory.get("count", torch.zeros(())) + 1
        return task_loss(s.s) + s.parts(s.s.logits).square().mean()

    def finish(self, s: Step) -> None:
        LOG.append(int(s.memory["count"]))


LOG: list[object] = []


def test_what_an_objective_sees() -> None:
    LOG.clear()
    m, frozen = model(), model()
    domains = {"x": images(10), "y": images(4, 1.0), "z": images(6, 2.0)}
    exapt.fit(m, ImageClassification(LABELS), source=domains, objective=Probe(), method=exapt.LoRA(rank=2), config=config(batch_size=6, steps=7))
    shapes = LOG[0]
    assert isinstance(shapes, Shapes)
    assert (shapes.features, shapes.classes, shapes.domains, shapes.source_rows, shapes.target_rows) == (8, 2, 3, 20, 0)
    assert [x for x in LOG if isinstance(x, tuple)] == [("epoch", 0, 20), ("epoch", 5, 20)]
    seen = [x for x in LOG if isinstance(x, Seen)]
    rows = [r for d in domains.values() for r in d]
    for live, still, changed in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert live.domains.bincount().tolist() == [2, 2, 2]
        assert torch.equal(live.batch["inputs"], torch.stack([rows[i]["image"] for i in live.index.tolist()]))  # type: ignore[misc]
        torch.testing.assert_close(still.logits, frozen(still.batch["inputs"]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(changed.features, torch.zeros_like(live.h))
    assert LOG[-1] == 7


def test_frozen_passes_of_a_whole_model_do_not_move_its_batch_norms() -> None:
    noted: list[torch.Tensor] = []

    @dataclass(frozen=True)
    class Still(Objective):
        setting = "source"

        def loss(self, s: Step) -> torch.Tensor:
            with s.frozen(), torch.no_grad():
                s.run(s.s.batch)
            with s.frozen():
                noted.append(normed[1].running_mean.clone())
            return task_loss(s.s)

    torch.manual_seed(0)
    normed = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 2))
    exapt.fit(normed, ImageClassification(LABELS), source=images(24), objective=Still(), config=config(steps=4))
    assert len(noted) == 4
    assert all(torch.equal(n, torch.zeros(6)) for n in noted)


@pytest.mark.parametrize("objective", [DANN(hidden=4), CORAL()])
def test_resuming_is_bit_exact(tmp_path: Path, objective: Objective) -> None:
    def run(folder: Path, steps: int, resume: bool) -> dict[str, torch.Tensor]:
        m = model()
        settings = config(steps=steps, folder=str(folder), save_every=5, resume=resume, schedule="constant", warmup=0.0)
        exapt.fit(m, ImageClassification(LABELS), source=images(20), target=images(14, 0.5), objective=objective, method=exapt.LoRA(rank=2), config=settings)
        return {k: v.detach().clone() for k, v in exapt.trainable(m).items()}

    whole = run(tmp_path / "whole", 10, False)
    with pytest.MonkeyPatch.context() as patch:
        from exapt.train.adapt import ObjectiveLoop

        one = ObjectiveLoop.one

        def stop(self: ObjectiveLoop, group: list[object], total: int) -> None:
            if self.step == 7:
                raise KeyboardInterrupt
            one(self, group, total)  # type: ignore[arg-type]

        patch.setattr(ObjectiveLoop, "one", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", 10, False)
    again = run(tmp_path / "cut", 10, True)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_bad_input() -> None:
    task = ImageClassification(LABELS)
    with pytest.raises(exapt.InputError, match="needs unlabelled data of the target: give target="):
        exapt.fit(model(), task, source=images(8), objective=CORAL())
    with pytest.raises(exapt.InputError, match="needs several labelled domains"):
        exapt.fit(model(), task, source=images(8), objective=Probe())
    with pytest.raises(exapt.InputError, match="belong to an objective"):
        exapt.fit(model(), task, images(8), target=images(8))
    with pytest.raises(exapt.InputError, match="the target has no rows"):
        exapt.fit(model(), task, source=images(8), target=[], objective=CORAL())
    conv = nn.Sequential(nn.Conv2d(1, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(exapt.InputError, match="no layer of the model can be told to be its head"):
        exapt.fit(conv, task, source=images(8), target=images(8), objective=CORAL())
    with pytest.raises(exapt.InputError, match="brings its own loss"):
        exapt.fit(model(), Custom(lambda m, b: m(b).sum()), images(8), objective=CORAL(), target=images(8), loss=lambda m, b: m(b).sum())
