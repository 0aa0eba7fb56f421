"""The closed loop on streams of digits-like images: what it does about which shift, and that all of it is undone bit for bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loop_streams
import numpy as np
import pytest
import torch
from loop_streams import POLICY, accuracy, net, reference, rows
from torch import Tensor

import exapt
from exapt.loop import Decision, Loop, Policy, records


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(net(), reference(), POLICY, tmp_path / "a.db")
    yield made
    made.close()


def fed(loop: Loop, kind: str, count: int, start: int = 0, size: int = 32) -> tuple[list[Decision], float]:
    """Decisions on ``count`` batches, and the accuracy on the last of them."""
    found, last = [], 0.0
    for i in range(start, start + count):
        x, y = rows(size, kind, seed=100 + i)
        out = loop.step(x, f"{kind}-{i}")
        found.append(out.decision)
        last = accuracy(out.predictions, y)
    return found, last


def decided(found: list[Decision]) -> Decision:
    return next(d for d in found if d.kind is not None)


def test_no_shift_no_action(loop: Loop) -> None:
    found, _ = fed(loop, "none", 12)
    assert {d.action for d in found} == {"none"}
    assert all(d.kind is None and not d.serving for d in found)
    assert all(d.estimate is not None and d.estimate["low"] <= d.estimate["value"] <= d.estimate["high"] for d in found)
    assert not exapt.adapters(loop.runner.model)


def test_label_shift_is_corrected_and_taken_back(loop: Loop) -> None:
    fed(loop, "none", 3)
    found, _ = fed(loop, "label", 8)
    d = decided(found)
    assert (d.kind, d.action) == ("label", "promote")
    assert d.alarm["rang"]
    assert d.alarm["log_wealth"] >= d.alarm["threshold"] > 0
    assert d.p_values["label"] < 0.05
    chosen = next(c for c in d.candidates if c["name"] == "prior_correction")
    prior = np.array(chosen["made"]["prior_correction"]["prior"])
    assert abs(prior[0] - loop_streams.SKEWED[0]) < 0.12
    x, y = rows(400, "label", seed=7)
    frozen = loop.runner([loop_batch(loop, x)])
    ours = loop.runner([loop_batch(loop, x)], tuple(d.serving))
    assert accuracy(ours.logits.argmax(1), y) > accuracy(frozen.logits.argmax(1), y) + 0.03
    assert abs(chosen["estimate"]["value"] - accuracy(ours.logits.argmax(1), y)) < 0.12
    back, _ = fed(loop, "none", 10)
    assert decided(back).action == "revert"
    assert back[-1].serving == []


def test_covariate_shift_gets_new_statistics(loop: Loop) -> None:
    fed(loop, "none", 2)
    found, last = fed(loop, "bright", 7)
    d = decided(found)
    assert "covariate" in d.kind
    assert d.action == "promote"
    assert {c["name"] for c in d.candidates} >= {"serving", "norm_statistics", "tent"}
    x, y = rows(300, "bright", seed=8)
    ours = accuracy(loop.step(x, "more").predictions, y)
    assert ours > accuracy(net()(x).argmax(1), y) + 0.2
    assert last > 0.6
    assert d.candidates[0]["name"] == "serving"
    assert d.candidates[0]["estimate"]["value"] < ours


def test_novel_rows_are_asked_for(tmp_path: Path) -> None:
    loop = Loop(net(classes=3), reference(classes=3), POLICY, tmp_path / "a.db")
    found, _ = fed(loop, "novel", 9)
    d = decided(found)
    assert (d.kind, d.action) == ("novel", "ask")
    assert 0 < len(d.ask) <= POLICY.ask
    asked = [(int(k.split("-")[1]), r) for k, r in d.ask]
    truth = [rows(32, "novel", seed=100 + i)[1] for i in range(9)]
    share = float((torch.cat(truth) == 3).float().mean())  # of the class that the model does not know
    assert np.mean([truth[i][r] == 3 for i, r in asked]) > share + 0.1
    loop.close()


def loop_batch(loop: Loop, x: Tensor) -> Any:
    from exapt.loop.rows import batch_of

    return batch_of(x, loop.runner.device)


def test_rollback_and_close_are_bit_identical(tmp_path: Path) -> None:
    model = net()
    before, twin = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(model)
    loop = Loop(model, reference(), POLICY, tmp_path / "a.db")
    probe = rows(16, "none", seed=9)[0]
    fed(loop, "none", 2)
    found, _ = fed(loop, "bright", 6)
    d = decided(found)
    adapted = loop.step(probe, "probe-1").logits
    assert not torch.equal(adapted, twin(probe))
    undone = loop.rollback(d.id)
    assert (undone.action, undone.serving) == ("rollback", [])
    assert torch.equal(loop.step(probe, "probe-2").logits, twin(probe))
    loop.rollback(undone.id)  # undoing the undoing
    assert torch.equal(loop.step(probe, "probe-3").logits, adapted)
    with pytest.raises(exapt.InputError, match="no decision 999"):
        loop.rollback(999)
    assert loop.close() is model
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(model(probe), twin(probe))
    assert all(p.requires_grad for p in model.parameters())


def test_the_users_adapter_stays(tmp_path: Path) -> None:
    model = exapt.attach(net(), exapt.LoRA(rank=2), where="head", name="mine", seed=0)
    for p in exapt.trainable(model).values():
        p.data.add_(0.05)
    x = rows(16, "none", seed=9)[0]
    with torch.no_grad():
        expected = model(x)
    loop = Loop(model, reference(), POLICY, tmp_path / "a.db")
    fed(loop, "none", 1)
    found, _ = fed(loop, "bright", 6)
    assert decided(found).action == "promote"
    loop.close()
    assert exapt.adapters(model) == ("mine",)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_labels_veto_and_roll_back(loop: Loop) -> None:
    """What serves is replaced by an adapter that does harm; labels that come later show it."""
    fed(loop, "none", 2)
    found, _ = fed(loop, "bright", 6)
    assert decided(found).action == "promote"
    clean_rows = [rows(32, "none", seed=300 + i) for i in range(3)]
    for i, (x, _) in enumerate(clean_rows):
        loop.step(x, f"later-{i}")
    result = None
    for i, (_, y) in enumerate(clean_rows):
        result = result or loop.label(f"later-{i}", y)
    assert result is not None
    assert result.action == "rollback"
    assert "labels" in result.reason
    assert loop.step(clean_rows[0][0], "after").decision.serving == []
    with pytest.raises(exapt.InputError, match='no batch "nowhere"'):
        loop.label("nowhere", [0])
    with pytest.raises(exapt.InputError, match="32 rows"):
        loop.label("later-0", [0, 1])
    assert loop.label("later-0", {3: 1, 5: -1}) is None


def test_labels_decide_between_candidates(tmp_path: Path) -> None:
    loop = Loop(net(), reference(), Policy(**{**POLICY.as_dict(), "labels": 5}), tmp_path / "a.db")
    for i in range(9):
        x, y = rows(32, "bright", seed=100 + i)
        d = loop.step(x, f"b-{i}").decision
        if d.kind:
            break
        loop.label(f"b-{i}", y)
    tested = next(c for c in d.candidates if c["name"] == "norm_statistics")["labelled"]
    assert tested["decides"]
    assert tested["low"] <= tested["accuracy"] <= tested["high"]
    assert d.action == "promote"
    loop.close()


def test_records_hold_what_a_report_needs(loop: Loop, tmp_path: Path) -> None:
    fed(loop, "none", 1)
    fed(loop, "bright", 6)
    y = rows(32, "none", seed=100)[1]
    loop.label("none-0", y)
    found = records(tmp_path / "a.db")
    assert [r["id"] for r in found] == list(range(1, 8))
    assert found[0]["labelled"] == 32
    assert found[0]["truth"] == pytest.approx(accuracy(torch.tensor(found[0]["predictions"]), y))
    assert found[1]["truth"] is None
    assert all({"alarm", "estimate", "kind", "action", "reason", "candidates", "seconds", "serving"} <= r.keys() for r in found)
    with pytest.raises(exapt.InputError, match="no such store"):
        records(tmp_path / "b.db")


def test_domain_adaptation_where_the_policy_allows(tmp_path: Path) -> None:
    policy = Policy(**{**POLICY.as_dict(), "remedies": ["objective"], "objectives": ["coral"], "steps": 6})
    loop = Loop(net(), reference(), policy, tmp_path / "a.db")
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    d = decided(fed(loop, "bright", 6)[0])
    assert torch.equal(torch.rand(3), drawn)  # training did not touch the user's generator
    coral = next(c for c in d.candidates if c["name"] == "coral")
    assert coral["made"]["coral"]["steps"] == 6
    assert 0 < coral["estimate"]["value"] < 1
    loop.close()


def test_adapt_once(tmp_path: Path) -> None:
    model = net()
    done = exapt.loop.adapt(model, reference(), [rows(64, "bright", seed=i)[0] for i in range(4)], POLICY, tmp_path / "bright")
    assert "covariate" in done.decision.kind
    assert done.file is not None
    assert exapt.adapters(model) == ("adapted",)
    x, y = rows(200, "bright", seed=9)
    with torch.no_grad():
        expected = model(x)
    assert accuracy(expected.argmax(1), y) > accuracy(net()(x).argmax(1), y) + 0.1
    with torch.no_grad():
        assert torch.equal(exapt.load(net(), done.file)(x), expected)
    plain = net()
    nothing = exapt.loop.adapt(plain, reference(), rows(128, "none", seed=5)[0], POLICY, tmp_path / "none")
    assert (nothing.decision.kind, nothing.file) == ("none", None)
    assert not exapt.adapters(plain)
    both = Policy(**{**POLICY.as_dict(), "remedies": ["test_time"], "margin": -1.0, "errors": -20.0})  # the affines and the statistics in one file
    again = exapt.loop.adapt(net(), reference(), rows(256, "bright", seed=3)[0], both, tmp_path / "t", name="t")
    assert again.file is not None
    assert [r["method"]["method"] for r in exapt.read(again.file).rules] == ["ln_tuning", "norm_statistics"]


@pytest.mark.parametrize("recheck", [True, False])
def test_a_return_to_normal_is_seen_without_an_alarm(tmp_path: Path, recheck: bool) -> None:
    loop = Loop(net(), reference(), dataclasses.replace(POLICY, recheck=recheck), tmp_path / "a.db")
    found, _ = fed(loop, "bright", 7)
    assert decided(found).action == "promote"
    loop.watch.update = lambda answer, number: False  # type: ignore[method-assign]
    back, _ = fed(loop, "none", 3 * POLICY.rows // 32)
    if not recheck:
        assert back[-1].serving == found[-1].serving
    else:
        assert next(d for d in back if d.kind == "none").action == "revert"
        assert back[-1].serving == []
    loop.close()


def test_a_head_that_is_named_like_a_role(tmp_path: Path) -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = net()
            self.conv1, self.bn1, self.conv2, self.bn2, self.linear = base.conv1, base.bn1, base.conv2, base.bn2, base.head

        def forward(self, x: Tensor) -> Tensor:
            h = self.bn1(self.conv1(x)).relu()
            return self.linear(self.bn2(self.conv2(h)).relu().flatten(1))

    loop = Loop(Named().eval(), reference(), POLICY, tmp_path / "a.db")
    d = decided(fed(loop, "label", 8)[0])
    assert [c.get("error") for c in d.candidates if c["name"] == "prior_correction"] == [None]
    loop.close()


def test_what_was_not_remedied_is_looked_at_again(loop: Loop) -> None:
    found, _ = fed(loop, "novel", 8)
    assert decided(found).action in ("ask", "keep")
    later, _ = fed(loop, "bright", 14)
    assert later[-1].serving, "rows of another shift after one that had no remedy must be remedied"


def test_the_state_does_not_grow_with_the_stream(loop: Loop) -> None:
    import json

    fed(loop, "none", 4)
    before = len(json.dumps(loop.watch.state()))
    fed(loop, "none", 12, start=4)
    assert len(json.dumps(loop.watch.state())) < 2 * before
