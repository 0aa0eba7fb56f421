"""The guard: answers by the frozen model unless adapting can be told to help; goes back bit for bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exapt
from exapt.core.components import component
from exapt.online.gain import disturbed, joined, learned, predicted, signals
from exapt.online.method import Batch, Host, Pass, TestTime

CLASSES = 4


def images(n: int, seed: int, classes: tuple[int, ...] = (0, 1, 2, 3), dark: float = 0.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes)[torch.arange(n) % len(classes)]
    x = torch.nn.functional.one_hot(y, CLASSES).float().repeat_interleave(2, 1)[:, None, None, :] + 0.8 * torch.randn(n, 1, 8, 8, generator=g)
    return x * (1 - dark) - 1.0 * dark, y


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, (8, 1)), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, CLASSES)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        x, y = images(32, 1000 + step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


REFERENCE = [images(50, s) for s in range(6)]


def score(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return float(np.mean([(model(x).argmax(1) == y).float().mean() for x, y in batches]))


STREAMS = {
    "iid": [images(40, 50 + i) for i in range(6)],
    "label sorted": [images(40, 60 + i, (i % 4,)) for i in range(8)],
    "dark": [images(40, 70 + i, dark=0.7) for i in range(8)],
}


@pytest.mark.parametrize("method", [exapt.BatchStatistics(), exapt.Tent(lr=0.01)])
def test_no_stream_ends_below_no_adaptation(trained: nn.Module, method: TestTime) -> None:
    found = {}
    for name, stream in STREAMS.items():
        frozen = score(trained, stream)
        o = exapt.online(copy.deepcopy(trained), method)
        free = score(o, stream)
        guarded = score(exapt.online(copy.deepcopy(trained), method, exapt.Guard(rows=80), reference=REFERENCE), stream)
        found[name] = (frozen, free, guarded)
        assert guarded >= frozen - 0.01, found
    assert found["dark"][1] > found["dark"][0] + 0.1, found
    assert found["label sorted"][1] < found["label sorted"][0] - 0.2, "without the guard, batch statistics of one class must do the known harm"
    assert found["dark"][2] > found["dark"][0] + 0.1, "where adapting helps, the guard must let it"


def test_what_is_not_let_out_is_not_learned(trained: nn.Module) -> None:
    o = exapt.online(copy.deepcopy(trained), exapt.Tent(), exapt.Guard(), reference=REFERENCE)
    before = {k: v.detach().clone() for k, v in o.host.parameters.items()}
    x, _ = STREAMS["iid"][0]
    y = o(x)
    assert o.diagnostics[-1]["action"] == "rollback"
    assert "the frozen model answers" in o.diagnostics[-1]["reason"]
    assert torch.equal(y, o.host.run_frozen(Batch((x,), {})).logits)
    assert all(torch.equal(before[k], v) for k, v in o.host.parameters.items())
    assert o.diagnostics[-1]["agreement"] <= 1


def test_a_collapse_is_reset(trained: nn.Module) -> None:
    o = exapt.online(copy.deepcopy(trained), exapt.Tent(lr=10.0), exapt.Guard(rows=20, margin=-100.0), reference=REFERENCE)
    for x, _ in STREAMS["label sorted"]:
        assert torch.isfinite(o(x)).all()
    actions = [d["action"] for d in o.diagnostics]
    assert "reset" in actions
    assert any("nats of entropy" in d["reason"] or "agreement has fallen" in d["reason"] for d in o.diagnostics)


@component("probe_upside_down", kind="test-of-tests")
@dataclass(frozen=True)
class UpsideDown(TestTime):
    """Answers wrongly."""

    def step(self, host: Host, batch: Batch) -> Tensor:
        host.memory["count"] = host.memory.get("count", torch.zeros(())) + 1
        return -host.run(batch).logits


def test_a_method_without_parameters_is_judged_too(trained: nn.Module) -> None:
    o = exapt.online(trained, UpsideDown(), exapt.Guard(), reference=REFERENCE)
    assert score(o, STREAMS["dark"]) == score(trained, STREAMS["dark"])
    assert "count" not in o.host.memory
    o.close()


def test_the_gain_is_learned_from_the_reference_alone(trained: nn.Module) -> None:
    o = exapt.online(copy.deepcopy(trained), exapt.BatchStatistics(), exapt.Guard(), reference=REFERENCE)
    o(STREAMS["dark"][0][0])
    model = o.host.kept("guard/gain_40")
    assert model["z"].shape[1] == 7
    z = model["z"].numpy()
    kernel = np.exp(-((z[:, None] - z[None]) ** 2).sum(-1) / 32)
    gains = kernel @ model["weights"].numpy() + 0.3 * model["weights"].numpy() + float(model["mean"])
    left_out = []
    for i in range(len(z)):
        others = np.arange(len(z)) != i
        a = np.linalg.solve(kernel[np.ix_(others, others)] + 0.3 * np.eye(len(z) - 1), (gains - float(model["mean"]))[others])
        left_out.append(gains[i] - float(model["mean"]) - kernel[i, others] @ a)
    assert float(model["error"]) == pytest.approx(float(np.sqrt(np.mean(np.square(left_out)))), rel=1e-6)
    x = model["z"][3] * model["scale"] + model["centre"]
    assert predicted(model, x) == pytest.approx(float(kernel[3] @ model["weights"].numpy() + float(model["mean"])), rel=1e-6)


def test_signals_and_disturbances() -> None:
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    changed = disturbed(Batch((), {"input_ids": ids, "attention_mask": mask}), 1.0, g).inputs
    assert torch.equal(changed[0, 3:], ids[0, 3:])
    assert not torch.equal(changed, ids)
    x = torch.randn(400, 3, generator=g)
    assert float((disturbed(Batch((x,), {}), 0.5, g).inputs - x).std() / x.std()) == pytest.approx(0.5, abs=0.05)
    rows = joined([Batch((ids[:1],), {}), Batch((ids[1:, :4],), {})])
    assert rows.inputs.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    p = torch.tensor([[0.6, 0.4], [0.1, 0.9]])
    expected = [0.75, 0.75, np.log(2), 0.0, 0.6474466, 0.6474466]
    assert signals(p, p.flip(1), torch.tensor(2.0)).tolist() == pytest.approx(expected, abs=1e-6)
    own = signals(p, p.flip(1), torch.tensor(2.0), x)[-1]
    assert float(own) == pytest.approx(np.log(x.double().numpy().var(0).sum()), abs=1e-6)


def test_rows_that_mean_predictions_are_taken_over(trained: nn.Module) -> None:
    o = exapt.online(copy.deepcopy(trained), exapt.BatchStatistics(), exapt.Guard(), reference=REFERENCE)
    for x, _ in (images(1, 90 + i) for i in range(3)):
        assert o(x).shape == (1, CLASSES)


def test_without_a_reference(trained: nn.Module) -> None:
    stream = STREAMS["label sorted"]
    o = exapt.online(copy.deepcopy(trained), exapt.BatchStatistics(), exapt.Guard(rows=40))
    assert score(o, stream) >= score(trained, stream) - 0.01
    assert "guard/root" not in o.host.memory


def test_a_model_in_training_mode_keeps_its_buffers(trained: nn.Module) -> None:
    model = copy.deepcopy(trained).train()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    o = exapt.online(model, exapt.BatchStatistics(), exapt.Guard(rows=40), reference=REFERENCE)
    for x, _ in STREAMS["dark"][:2]:
        o(x)
    o.close()
    assert model.training
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


def test_bad_input(trained: nn.Module) -> None:
    with pytest.raises(exapt.InputError, match="the reference has 10 rows; give at least 20, or none"):
        exapt.online(copy.deepcopy(trained), exapt.BatchStatistics(), exapt.Guard(), reference=[images(10, 0)])
    with pytest.raises(exapt.InputError, match="rows is at least 1"):
        exapt.online(copy.deepcopy(trained), exapt.BatchStatistics(), exapt.Guard(rows=0))
    assert learned  # a reference whose labels do not match its rows gives no regression
    o = exapt.online(copy.deepcopy(trained), exapt.BatchStatistics(), reference=REFERENCE)
    o.host.reference = [(b, y[:1] if y is not None else None) for b, y in o.host.reference]
    assert learned(o.host, 8, lambda host, batch: host.run(batch).logits, lambda h: h.mean()) is None
    assert isinstance(o.host.run(Batch((STREAMS["iid"][0][0],), {})), Pass)
