"""The benches of transfers and estimates: their measures and statistics against plain computations, and a whole run on few rows."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from exapt.shift.accuracy.ac import AverageConfidence
from exapt.shift.accuracy.doc import DoC

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("EXAPT_BENCH_CACHE", str(tmp_path))
    return importlib.import_module("shift_transfers")


@pytest.fixture
def estimates(transfers: ModuleType) -> ModuleType:
    return importlib.import_module("shift_estimates")


def blobs(seed: int, n: int = 120, move: float = 0.0, share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < share).astype(int)
    return (rng.normal(size=(n, 24)) + 1.5 * y[:, None] * (np.arange(24) < 2) + move * (np.arange(24) > 20)).astype(np.float32), y


def tiny(transfers: ModuleType) -> object:
    x, y = blobs(0)
    pool, pool_y, test, test_y = importlib.import_module("shift_places").halves(*blobs(1, move=1.0))
    return importlib.import_module("shift_places").Transfer(x, y, pool, pool_y, test, test_y, importlib.import_module("shift_places").correct(test_y))


def test_the_target_is_halved_the_same_way_every_time(transfers: ModuleType) -> None:
    x, y = np.arange(11.0)[:, None], np.arange(11)
    a, a_y, _, b_y = importlib.import_module("shift_places").halves(x, y)
    assert sorted([*a_y, *b_y]) == list(range(11))
    np.testing.assert_array_equal(a[:, 0], a_y)
    np.testing.assert_array_equal(importlib.import_module("shift_places").halves(x, y)[3], b_y)


def test_entities_and_their_f1(transfers: ModuleType) -> None:
    tag = importlib.import_module("shift_places").TAGS.index
    gold = np.array([tag(t) for t in ("B-person", "I-person", "O", "B-location", "B-location", "O", "B-misc", "I-misc")])
    said = np.array([tag(t) for t in ("B-person", "I-person", "O", "B-location", "I-location", "B-misc", "I-person", "I-misc")])
    assert importlib.import_module("shift_places").spans(gold) == {(0, 1, 0), (3, 3, 1), (4, 4, 1), (6, 7, 3)}
    assert importlib.import_module("shift_places").spans(said) == {(0, 1, 0), (3, 4, 1), (5, 5, 3), (6, 6, 0), (7, 7, 3)}
    hits, totals = importlib.import_module("shift_places").entities(np.array([0, 0, 0, 1, 1, 1, 1, 1]), gold)(said)
    assert hits.tolist() == [2, 0]
    assert totals.tolist() == [2, 7]  # precision 1 of 5, recall 1 of 4: F1 = 2 / 9
    assert importlib.import_module("shift_paired").score((hits, totals)) == pytest.approx(2 / 9)
    assert importlib.import_module("shift_places").common("I-politician") == tag("I-person")
    assert importlib.import_module("shift_places").common("B-algorithm") == tag("B-misc")


def test_paired_intervals(transfers: ModuleType) -> None:
    rng = np.random.default_rng(0)
    ones = np.ones((5, 400), dtype=int)
    base = (rng.random((5, 400)) < 0.7).astype(int)
    better = np.maximum(base, rng.random((5, 400)) < 0.1)
    as_counts = [np.stack([v, ones]) for v in (better, base)]
    found = importlib.import_module("shift_paired").paired([tuple(as_counts)])
    assert found["difference"] == pytest.approx(better.mean() - base.mean())
    assert 0 < found["low"] < found["difference"] < found["high"]
    same = importlib.import_module("shift_paired").paired([(as_counts[1], as_counts[1])] * 2)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0}
    # The plain bootstrap of rows alone, for one seed.
    one = [c[:, :1] for c in as_counts]
    gap = one[0][0, 0] - one[1][0, 0]
    plain = np.quantile(rng.choice(gap, (4000, 400)).mean(1), [0.025, 0.975])
    np.testing.assert_allclose([importlib.import_module("shift_paired").paired([tuple(one)])[k] for k in ("low", "high")], plain, atol=0.006)


def test_a_whole_cell_and_its_collection(transfers: ModuleType) -> None:
    t = tiny(transfers)
    chosen = {k: v for k, v in transfers.frozen(True).items() if k in ("continued", "iwerm", "coral", "shot")}
    found = [{"family": "f", "transfer": "t", "seed": s, **transfers.transfer_cell(t, s, chosen, True)} for s in (0, 1)]
    again = {"family": "f", "transfer": "t", "seed": 0, **transfers.transfer_cell(t, 0, chosen, True)}
    assert again["counts"] == found[0]["counts"]
    assert set(found[0]["counts"]) == {"source", "label_shift_em", *chosen}
    assert all(np.shape(v) == (2, 60) for v in found[0]["counts"].values())
    assert found[0]["selected"]["name"] in found[0]["counts"]
    assert 1 <= found[0]["ess"] <= found[0]["source_rows"] == 96
    mean = importlib.import_module("shift_paired").summary(found)["f"]["mean"]
    assert mean["source"]["difference"] == 0
    assert mean["(oracle)"]["score"] >= mean["selected"]["score"]
    table = transfers.table({"families": importlib.import_module("shift_paired").summary(found)})
    assert "| coral |" in table


def test_shifts_and_methods_change_the_head(transfers: ModuleType) -> None:
    t = tiny(transfers)
    s = transfers.split(t, 0, 20)
    before = transfers.outputs(s.model, t.test)[0]
    for key, shift in (("dann", "lora"), ("shot", "full")):
        chosen = {"field": "", "value": 0.0, "shift": shift, "rate": 1e-2}
        after = transfers.adapted(s, t.pool, key, chosen, 0, 10)
        assert np.abs(transfers.outputs(after, t.test)[0] - before).max() > 1e-3
    np.testing.assert_array_equal(transfers.outputs(s.model, t.test)[0], before)


def case(estimates: ModuleType) -> object:
    def rows(seed: int, n: int, **how: float) -> object:
        x, y = blobs(seed, n, **how)
        p = 1 / (1 + np.exp(-1.5 * (x[:, 0] + x[:, 1] - 1.5)))
        p2 = 1 / (1 + np.exp(-3 * (x[:, 0] - 0.75)))
        others = np.stack([np.column_stack([1 - q, q]) for q in (p2, 0.5 * (p + p2))])
        return estimates.Rows(np.column_stack([1 - p, p]).astype(float), x, y, others)

    batches = [("same", "none", rows(3, 80)), ("few", "label", rows(4, 80, share=0.1)), ("moved", "covariate", rows(5, 80, move=2.0))]
    return estimates.Case(rows(2, 200), batches)


def test_a_cell_of_estimates_and_its_collection(estimates: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(estimates.ESTIMATORS, "mcbpe")  # boosted trees are slow
    ensemble = estimates.AccuracyEnsemble
    monkeypatch.setattr(estimates, "AccuracyEnsemble", lambda: ensemble({"ac": AverageConfidence(n_boot=20), "doc": DoC(n_boot=20)}))
    c = case(estimates)
    batches = estimates.cell(c)
    for entry, (_, _, rows) in zip(batches, c.batches, strict=True):
        assert entry["truth"] == pytest.approx(accuracy_score(rows.y, rows.p.argmax(1)))
        assert set(entry["estimates"]) == {"ac", "doc", *estimates.ESTIMATORS, "ensemble"}
        assert entry["estimates"]["ac"][0] == pytest.approx(rows.p.max(1).mean())
    assert batches[2]["diagnosis"] == "covariate"
    found = [{"family": "f", "case": "c", "seed": 0, "batches": batches}]
    judged = estimates.judged(found)
    assert judged["ac"]["error"] == pytest.approx(np.mean([abs(b["estimates"]["ac"][0] - b["truth"]) for b in batches]))
    assert judged["ac"]["against"]["difference"] == 0
    diagnosis = estimates.named(found)
    assert np.sum(diagnosis["all"]["confusion"]) == 3
    assert "| atc_scaled |" in estimates.table({"estimators": judged, "diagnosis": diagnosis})


def test_an_unknown_estimate_counts_as_unknown(estimates: ModuleType) -> None:
    def cell(seed: int, **values: object) -> dict[str, object]:
        batch = {"name": "b", "kind": "none", "diagnosis": "none", "truth": 0.5, "estimates": values}
        return {"family": "f", "case": "c", "seed": seed, "batches": [batch]}

    found = [cell(0, ac=[0.9, 0.4, 1.0], e=None, never=None), cell(1, ac=[0.6, 0.55, 0.7], e=[0.75, 0.6, 0.9], never=None)]
    errors = {k: v["f/c: b"] for k, v in estimates.errors(found).items()}
    assert errors["ac"] == pytest.approx({"error": 0.25, "baseline": 0.25, "covered": 0.5, "known": 1.0})
    assert errors["e"] == pytest.approx({"error": 0.25, "baseline": 0.1, "covered": 0.0, "known": 0.5})  # compared on the seed that is known
    assert errors["never"]["error"] is None
    assert set(estimates.judged(found)) == {"ac", "e"}


def test_a_class_is_taken_away(estimates: ModuleType) -> None:
    rows = estimates.Rows(np.array([[0.2, 0.2, 0.6], [0.9, 0.1, 0.0]]), np.zeros((2, 1)), np.array([2, 0]))
    np.testing.assert_allclose(rows.without(2).p, [[0.5, 0.5], [0.9, 0.1]])


@pytest.mark.parametrize("bench", ["shift_transfers", "shift_estimates"])
def test_committed_results_are_of_this_form(transfers: ModuleType, bench: str) -> None:
    file = BENCH / "results" / f"{bench}.json"
    if not file.exists():
        pytest.skip("not measured yet")
    found = json.loads(file.read_text())
    assert {"machine", "versions", "seeds", "command"} <= set(found)
    assert importlib.import_module(bench).table(found).count("\n") > 5
