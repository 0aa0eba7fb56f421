"""The store: killed at any point and gone on bit for bit, foreign stores, full disks, and rows that cannot be used."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from killed_loop import STREAM
from loop_streams import POLICY, net, reference, rows
from tiny import model_of
from torch import nn

import exapt
from exapt.loop import Loop, Policy, records, rollback
from exapt.loop.runner import Answer
from exapt.loop.store import Store

HERE = Path(__file__).parent


def fed(loop: Loop, stream: list[tuple[str, int]] = STREAM) -> None:
    for kind, i in stream:
        loop.step(rows(32, kind, seed=100 + i)[0], f"{kind}-{i}")


def content(path: Path) -> dict[str, Any]:
    """All that a store holds, but for the seconds that things took."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        found = {r["id"]: {k: v for k, v in r.items() if k != "seconds"} for r in records(path)}
        answers = {k: safetensors.torch.load(a) for k, a in db.execute("SELECT key, answers FROM decisions WHERE answers IS NOT NULL")}
        adapters = {n: safetensors.torch.load(d) for n, d in db.execute("SELECT name, data FROM adapters")}
        buffer = {(n, k): safetensors.torch.load(r) for n, k, r in db.execute("SELECT number, key, rows FROM buffer")}
        return {
            "decisions": found,
            "state": db.execute("SELECT version, json FROM state").fetchone(),
            "serving": list(db.execute("SELECT id, serving FROM decisions ORDER BY id")),
            "answers": answers, "adapters": adapters, "buffer": buffer,
        }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nothing interrupted; it adapts, and goes back."""
    path = tmp_path_factory.mktemp("loop") / "whole.db"
    loop = Loop(net(), reference(), POLICY, path)
    fed(loop)
    loop.close()
    actions = [r["action"] for r in records(path)]
    assert "promote" in actions
    assert "revert" in actions
    return path


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["before the transaction", "in the transaction", "after the commit"])
def test_interrupted_at_every_commit(moment: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process ends at batch after batch, and another goes on; in the end the store is that of the run that was never interrupted."""
    path, original, calls = tmp_path / "a.db", Store.commit, 0

    def commit(self: Store, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0 and moment == "before the transaction":
            raise Killed
        if calls % 3 == 0 and moment == "in the transaction":
            self._begin()
            self.db.execute("UPDATE state SET version = 999")
            self.db.execute("DELETE FROM buffer")
            self.db.close()  # what a killed process leaves: a transaction that was never committed
            raise Killed
        original(self, *args, **kwargs)
        if calls % 3 == 0 and moment == "after the commit":
            raise Killed

    monkeypatch.setattr(Store, "commit", commit)
    for _ in range(40):
        loop = Loop(net(), reference(), POLICY, path)
        try:
            fed(loop)
            break
        except Killed:
            with contextlib.suppress(sqlite3.Error):
                loop.store.db.close()
    else:
        pytest.fail("the stream never ended")
    loop.close()
    assert same(content(path), content(whole))


def _new(line: str) -> list[str]:
    return [line.split()[0]] if line.strip().endswith(" 0") else []


@pytest.mark.slow
def test_killed_by_a_signal(whole: Path, tmp_path: Path) -> None:
    path, answered, draw = tmp_path / "a.db", [], random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    for kill in (True, True, True, False):
        run = subprocess.Popen([sys.executable, HERE / "killed_loop.py", path], stdout=subprocess.PIPE, text=True, env=environment)
        assert run.stdout is not None
        assert run.stdout.readline() == "started\n"
        if kill:
            for _ in range(draw.randint(1, 4)):  # after some batches, and a while
                answered += _new(run.stdout.readline())
            time.sleep(draw.uniform(0.0, 0.5))
            run.kill()
        answered += [k for line in run.communicate()[0].splitlines() for k in _new(line)]
    assert run.returncode == 0
    assert len(answered) == len(set(answered))  # no batch was applied twice
    assert same(content(path), content(whole))


def test_a_restart_answers_known_batches_from_the_store(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    loop = Loop(net(), reference(), POLICY, path)
    fed(loop, STREAM[:7])
    first = loop.step(rows(32, "bright", seed=104)[0], "bright-4")
    assert first.repeated
    assert torch.equal(first.logits, content(path)["answers"]["bright-4"]["logits"])
    before = content(path)
    loop.close()
    again = Loop(net(), reference(), POLICY, path)
    assert again.now.serving == loop.now.serving != ()
    fed(again, STREAM[:7])
    assert same(content(path), before)
    again.close()


@pytest.mark.parametrize("other", ["model", "policy", "reference", "seed"])
def test_foreign_stores_are_refused_with_both_names(other: str, tmp_path: Path) -> None:
    path, model = tmp_path / "a.db", net()
    Loop(net(), reference(), POLICY, path).close()
    mine = exapt.fingerprint(model)
    if other == "model":
        model.head.weight.data.add_(1.0)
    policy = Policy(rows=64) if other == "policy" else POLICY
    with pytest.raises(exapt.InputError, match=f"belongs to {other} .*, this loop has {other} .*name another store=") as found:
        Loop(model, reference(300 if other == "reference" else 400), policy, path, seed=int(other == "seed"))
    assert other != "model" or (mine in str(found.value) and exapt.fingerprint(model) in str(found.value))
    assert other != "policy" or ("draws=4" in str(found.value) and "rows=64" in str(found.value))
    assert not exapt.adapters(model)


def test_undone_in_the_store_alone(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with contextlib.closing(sqlite3.connect(whole)) as source, contextlib.closing(sqlite3.connect(path)) as target:
        source.backup(target)
    reverted = next(r["id"] for r in records(path) if r["action"] == "revert")
    done = rollback(path, reverted)
    assert (done.action, records(path)[-1]["id"]) == ("rollback", done.id)
    loop = Loop(net(), reference(), POLICY, path)
    assert list(loop.now.serving) == done.serving != []
    out = loop.step(rows(32, "bright", seed=104)[0], "again")
    told = content(whole)["answers"]["bright-4"]["logits"]  # the last batch that these adapters answered
    assert torch.equal(out.logits, told)
    loop.close()
    with pytest.raises(exapt.InputError, match="no decision 999"):
        rollback(path, 999)
    with pytest.raises(exapt.InputError, match="no such store"):
        rollback(tmp_path / "b.db", 1)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(exapt.InputError, match="not a store"):
        Loop(net(), reference(), POLICY, path)
    with pytest.raises(exapt.InputError, match="not a store"):
        records(path)


def test_two_loops_on_one_store(tmp_path: Path) -> None:
    one, two = (Loop(net(), reference(), POLICY, tmp_path / "a.db") for _ in range(2))
    one.step(rows(8)[0], "a")
    with pytest.raises(exapt.InputError, match="another loop has written"):
        two.step(rows(8)[0], "b")
    one.close()
    two.close()


class Full:
    """A connection whose disk is full from the n-th time on that rows are written."""

    def __init__(self, db: sqlite3.Connection, statement: str) -> None:
        self._db, self._statement, self.full = db, statement, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, sql: str, *args: Any) -> Any:
        if self.full and sql.startswith(self._statement):
            raise sqlite3.OperationalError("database or disk is full")
        return self._db.execute(sql, *args)


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT INTO decisions", "COMMIT"])
def test_a_full_disk(statement: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the very batch that would have promoted an adapter: the model keeps answering as before it."""
    path = tmp_path / "a.db"
    loop = Loop(net(), reference(), POLICY, path)
    until = next(i for i, r in enumerate(records(whole)) if r["action"] == "promote")
    fed(loop, STREAM[:until])
    before = content(path)
    loop.store.db = Full(loop.store.db, statement)  # type: ignore[assignment]
    loop.store.db.full = True  # type: ignore[attr-defined]
    kind, i = STREAM[until]
    x = rows(32, kind, seed=100 + i)[0]
    out = loop.step(x, f"{kind}-{i}")
    assert out.decision.action == "degraded"
    assert "database or disk is full" in loop.degraded
    assert "adapts no more" in loop.degraded
    assert [r.message for r in caplog.records if "disk is full" in r.message]
    with torch.no_grad():
        assert torch.equal(out.logits, net()(x))
    assert not exapt.adapters(loop.runner.model)
    assert torch.equal(loop.step(x, "more").logits, out.logits)
    with pytest.raises(exapt.InputError, match="disk is full"):
        loop.rollback(1)
    loop.store.db.full = False  # type: ignore[attr-defined]
    loop.close()
    assert same(content(path), before)
    again = Loop(net(), reference(), POLICY, path)  # with room on the disk it goes on, at the batch that was not kept
    assert again.step(x, f"{kind}-{i}").decision.action == "promote"
    again.close()


def test_a_store_that_cannot_be_written(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.db"
    loop = Loop(net(), reference(), POLICY, path)
    fed(loop, STREAM[:7])
    serving = loop.now.serving
    x = rows(16, "bright", seed=5)[0]
    expected = loop.runner([exapt.loop.rows.batch_of(x, loop.runner.device)], serving).logits
    assert serving
    loop.close()
    connect = sqlite3.connect

    def read_only(target: Any, *args: Any, **kwargs: Any) -> sqlite3.Connection:
        if not kwargs.get("uri") and target != ":memory:":
            target, kwargs = f"{Path(target).absolute().as_uri()}?mode=ro", {**kwargs, "uri": True}
        return connect(target, *args, **kwargs)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    again = Loop(net(), reference(), POLICY, path)
    assert "readonly" in again.degraded
    out = again.step(x, "more")
    assert out.decision.action == "degraded"
    assert torch.equal(out.logits, expected)  # the last committed state serves
    again.close()
    nowhere = Loop(net(), reference(), POLICY, tmp_path / "no" / "b.db")
    assert nowhere.degraded
    assert nowhere.step(x).logits.shape == (16, 4)
    with pytest.raises(exapt.InputError, match="labels cannot be kept"):
        nowhere.label("a", [0])
    nowhere.close()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(net(), reference(), POLICY, tmp_path / "a.db")
    yield made
    made.close()


def test_rows_that_are_not_finite(loop: Loop) -> None:
    x = rows(12)[0]
    clean = loop.step(x, "clean")
    x[3, 0, 0, 0], x[7] = float("nan"), float("inf")
    out = loop.step(x, "dirty")
    assert "2 rows are not finite" in out.decision.notes[0]
    assert out.decision.alarm["rows"] == clean.decision.alarm["rows"] + 10
    kept = [i for i in range(12) if i not in (3, 7)]
    assert torch.equal(out.logits[kept], clean.logits[kept])
    out = loop.step(torch.full_like(x, float("nan")), "nothing")
    assert out.decision.action == "none"
    assert "no row that is finite" in out.decision.reason
    assert loop.step(rows(12)[0], "after").decision.estimate is not None


def test_rows_of_another_width(loop: Loop) -> None:
    out = loop.step(torch.zeros(4, 1, 5, 5), "smaller")  # the network can run on it: 3 x 3 positions all the same
    assert out.decision.action == "refused"
    assert "(1, 5, 5) float, the reference's (1, 6, 6) float" in out.decision.reason
    with pytest.raises(exapt.InputError, match=r"batch wide: rows are \(1, 9, 9\) float, the reference's \(1, 6, 6\)"):
        loop.step(torch.zeros(4, 1, 9, 9), "wide")
    outcomes = list(loop.run([("a", torch.zeros(4, 2, 6, 6)), ("b", rows(4)[0]), ("c", "text")]))
    assert [o.decision.action for o in outcomes] == ["refused", "none", "refused"]
    assert [o.logits is None for o in outcomes] == [True, False, True]
    assert [r["action"] for r in records(loop.store.path)] == ["refused", "refused", "refused", "none", "refused"]


def test_batches_of_one(loop: Loop) -> None:
    outs = [loop.step(rows(1, seed=i)[0]) for i in range(20)]
    assert [o.decision.key for o in outs[:2]] == ["batch-1", "batch-2"]
    assert all(o.logits.shape == (1, 4) and o.decision.action == "none" for o in outs)


def test_a_reference_of_ten_rows(tmp_path: Path) -> None:
    loop = Loop(net(), reference(10), POLICY, tmp_path / "a.db")
    assert "nothing is adapted: ShiftDiagnosis" in loop.notes[0]
    for i in range(12):
        out = loop.step(rows(32, "none" if i < 4 else "bright", seed=i)[0])
        assert out.logits.shape == (32, 4)
    sure = Answer(1e4 * torch.eye(4)[[0, 1]], loop.lab.reference.answer.features[:2])
    loop.watch.start(sure)  # a mean at the end of its range cannot be bounded
    assert loop.watch.shown()["by"] == "conformal martingale"
    found = [r for r in records(tmp_path / "a.db") if r["kind"]]
    assert {(r["kind"], r["action"]) for r in found} <= {("unknown", "none")}
    assert all("nothing is adapted" in r["reason"] for r in found)
    assert not exapt.adapters(loop.runner.model)
    loop.close()


def test_a_class_that_the_reference_lacks(tmp_path: Path) -> None:
    x, y = reference(600)
    loop = Loop(net(), (x[y != 3], y[y != 3]), POLICY, tmp_path / "a.db")
    for i in range(12):
        out = loop.step(rows(32, seed=100 + i)[0])
    assert out.logits.shape == (32, 4)
    found = [r for r in records(tmp_path / "a.db") if r["kind"]]
    assert found
    assert not any("failed" in r["reason"] for r in found)
    loop.close()


def test_whatever_goes_wrong_the_model_answers(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(32, "bright", seed=1)[0]
    expected = loop.step(x, "a")

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a fault of the estimator")

    before = loop.watch.state()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_estimated", broken)
        out = loop.step(x, "b")
    assert torch.equal(out.logits, expected.logits)
    assert "a fault of the estimator" in out.decision.reason
    assert loop.watch.state() == before
    with monkeypatch.context() as patch:
        patch.setattr("exapt.loop.loop.decide", broken)
        last = [loop.step(rows(32, "bright", seed=i)[0], f"c{i}") for i in range(5)]
    failed = [o.decision for o in last if "the decision failed" in o.decision.reason]
    assert [d.action for d in failed] == ["keep"]
    assert not exapt.adapters(loop.runner.model)


def test_tokens_of_several_lengths_by_name(tmp_path: Path) -> None:
    model = model_of("text")
    g = torch.Generator().manual_seed(0)

    def tokens(n: int, low: int = 3, length: int = 6) -> Any:
        return {"x": torch.randint(low, 40, (n, length), generator=g)}

    pairs = [(tokens(60, length=k), torch.arange(60) % 5) for k in (5, 6, 7)]
    loop = Loop(model, pairs, Policy(**{**POLICY.as_dict(), "rows": 64}), tmp_path / "a.db")
    for i in range(8):
        out = loop.step(tokens(16, 3 if i < 2 else 36, 5 + i % 3))
        assert out.logits.shape == (16, 5)
    loop.close()
    again = Loop(model, pairs, Policy(**{**POLICY.as_dict(), "rows": 64}), tmp_path / "a.db")
    assert len(again.now.held) == len(loop.now.held)
    assert all(same(a.batch.kwargs, b.batch.kwargs) for a, b in zip(again.now.held, loop.now.held, strict=True))
    again.close()
    with pytest.raises(exapt.InputError, match="one and the same number of rows"):
        exapt.loop.rows.batch_of((torch.zeros(3, 2), torch.zeros(4)), torch.device("cpu"))


@pytest.mark.parametrize(
    ("reference_of", "text"),
    [
        (lambda x, y: None, "reference= needs held-out rows"),
        (lambda x, y: (x, y[:5]), "5 labels"),
        (lambda x, y: (x, y + 2), "labels must be from 0 to 3"),
        (lambda x, y: (x / 0, y), "NaN or infinity"),
        (lambda x, y: (x, y.float()), "float32"),
    ],
)
def test_references_that_cannot_be_used(reference_of: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(exapt.InputError, match=text):
        Loop(net(), reference_of(*rows(40)), POLICY, tmp_path / "a.db")


def test_a_model_without_batch_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = rows(600, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    loop = Loop(model, reference(), POLICY, tmp_path / "a.db")
    for i in range(8):
        out = loop.step(rows(32, "bright", seed=i)[0])
    found = [c for r in records(tmp_path / "a.db") for c in r["candidates"]]
    assert any("no batch norms" in (c.get("error") or "") for c in found)
    assert any("norm layers" in (c.get("error") or "") for c in found)
    assert out.logits.shape == (32, 4)
    loop.close()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"alpha": 2.0}, "alpha is 2.0"), ({"remedies": ["prior_corection"]}, 'did you mean "prior_correction"'), ({"rows": 5}, "at least 40"),
        ({"aplha": 1}, 'did you mean "alpha"'),
    ],
)  # fmt: skip
def test_policies_that_cannot_be_used(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(exapt.InputError, match=text):
        Policy.from_dict(fields)
    assert Policy.from_dict(POLICY.as_dict()) == POLICY
