"""components, watch, adapt, report and rollback: from files on disk to answers, decisions, an adapter file and a page."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shell import TEXTS, needs_minilm, run, write_config, write_rows
from torch import Tensor

import exapt
from exapt.cli.feed import Folder, Reader, inputs_of, lines, stem
from exapt.cli.models import load_model
from exapt.cli.watch import Answers
from exapt.loop import Decision, Outcome, records, rollback

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
import torch
from torch import nn


def rows(n, seed, shifted=False):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    centres = 2.5 * torch.eye(3, 6)
    x = centres[y] + torch.randn(n, 6, generator=g)
    return (0.3 * x + torch.tensor([0.0, 0, 0, 2, 2, 2]) if shifted else x), y


def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        x, y = rows(600, 1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()
"""
MODEL = "python:net_of_a_stream:make"
QUICK = ("--policy.rows", "96", "--policy.draws", "8", "--policy.remedies", "norm_statistics")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a reference, and a stream of files in five formats: three batches as before, then shifted ones."""
    (tmp_path / "net_of_a_stream.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "net_of_a_stream", raising=False)
    x, y = rows(300, 2)
    np.savez(tmp_path / "reference.npz", x=x.numpy(), label=y.numpy())
    (tmp_path / "days").mkdir()
    for i in range(7):
        put(tmp_path / "days", i, *rows(48, 10 + i, i >= 3))
    return tmp_path


def rows(n: int, seed: int, shifted: bool = False) -> tuple[Tensor, Tensor]:
    import net_of_a_stream

    return net_of_a_stream.rows(n, seed, shifted)


def put(folder: Path, i: int, x: Tensor, y: Tensor) -> None:
    """Batch ``i``, in a format that its number chooses; the first with its labels."""
    from safetensors.torch import save_file

    path = folder / f"{i:03d}"
    if i == 0:
        np.savez(path.with_suffix(".npz"), x=x.numpy(), label=y.numpy())
    elif i % 5 == 1:
        np.save(path.with_suffix(".npy"), x.numpy())
    elif i % 5 == 2:
        save_file({"x": x}, path.with_suffix(".safetensors"))
    elif i % 5 == 3:
        path.with_suffix(".jsonl").write_text("".join(json.dumps({"x": r}) + "\n" for r in x.tolist()))
    else:
        path.with_suffix(".csv").write_text("a,b,c,d,e,f\n" + "".join(",".join(map(repr, r)) + "\n" for r in x.tolist()))


def watch(place: Path, *words: object) -> Any:
    return run("watch", MODEL, place / "days", "--reference", place / "reference.npz", "--store", place / "s.db", "--once", *QUICK, *words)


def test_components_lists_the_catalogue() -> None:
    listed = run("components", "--json").json
    keys = {(r["kind"], r["key"]) for r in listed}
    assert len(keys) == len(listed) == len(exapt.components()) + len(exapt.methods())
    assert {("test-time", "tent"), ("method", "lora"), ("detector", "mmd_test")} <= keys
    tent = next(r for r in listed if r["key"] == "tent")
    assert tent == exapt.components()["tent"].record()
    table = run("components", "--kind", "test-time")
    assert "tent" in table.out
    assert "mmd_test" not in table.out
    assert 'did you mean "test-time"' in run("components", "--kind", "testtime").complaint


def test_the_table_of_components_holds_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import component_table

    own = [c for c in exapt.components().values() if c.module.startswith("exapt.")]
    page = component_table.page()
    assert [c.key for c in own if f"| `{c.name}` | `{c.key}` |" not in page] == []
    assert f"{len(own)} components beside" in page


def test_watch_answers_adapts_and_reports(place: Path) -> None:
    done = watch(place, "--out", place / "answers.jsonl")
    assert done.code == 0, done.err
    shown = done.out.splitlines()
    assert [re.split(r"\s{2,}", s.strip())[1] for s in shown] == sorted(p.name for p in (place / "days").iterdir())
    made = records(place / "s.db")
    assert [r["action"] for r in made][:3] == ["none"] * 3
    promoted = next(r for r in made if r["action"] == "promote")
    assert promoted["kind"] in ("covariate", "label+covariate")
    assert promoted["id"] in (5, 6)
    assert (made[0]["labelled"], made[1]["labelled"]) == (48, 0)

    said = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    for r in made:
        assert [s["prediction"] for s in said if s["batch"] == r["key"]] == r["predictions"]
    assert made[0]["predictions"] == load_model(MODEL)(rows(48, 10)[0]).argmax(-1).tolist()

    again = watch(place, "--out", place / "answers.jsonl")
    assert (again.code, again.out) == (0, "")
    assert [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()] == said

    page = run("report", place / "s.db", "-o", place / "r.html")
    assert page.out == f"{place / 'r.html'}\n"
    assert "promoted" in (place / "r.html").read_text()

    undone = run("rollback", place / "s.db", promoted["id"], "--json").json
    assert (undone["action"], undone["serving"]) == ("rollback", [])
    put(place / "days", 7, *rows(48, 17, True))
    after = watch(place, "--json")
    assert json.loads(after.out)["serving"] == []
    assert json.loads(after.out)["predictions"] == load_model(MODEL)(rows(48, 17, True)[0]).argmax(-1).tolist()


def test_labels_may_come_later(place: Path) -> None:
    assert watch(place).code == 0
    truth = rows(48, 11)[1].tolist()
    (place / "days" / "001.labels.jsonl").write_text("".join(json.dumps({"label": v}) + "\n" for v in truth))
    (place / "days" / "002.labels.csv").write_text("row,label\n5,1\n7,2\n")
    (place / "days" / "999.labels.csv").write_text("row,label\n5,1\n")
    done = watch(place)
    assert "there is no 999.*" in done.err
    assert "1 of the stream's files or batches were left out" in done.err.splitlines()[-1]
    assert done.code == 2
    made = {r["key"]: r for r in records(place / "s.db")}
    right = [p == t for p, t in zip(made["001.npy"]["predictions"], truth, strict=True)]
    assert made["001.npy"]["truth"] == sum(right) / 48
    assert made["002.safetensors"]["labels"] == {"5": 1, "7": 2}


def test_what_cannot_be_used_is_said_and_the_stream_goes_on(place: Path) -> None:
    (place / "days" / "002b.npz").write_bytes(b"no archive")
    np.save(place / "days" / "002c.npy", np.zeros((4, 5), dtype=np.float32))
    (place / "days" / "notes.txt").write_text("not a batch")
    (place / "days" / "009.npy.part").write_bytes(b"")
    done = watch(place, "--json")
    assert done.code == 2
    assert "left out: " in done.err
    assert "002b.npz" in done.err.splitlines()[-1]
    actions = {r["key"]: r["action"] for r in map(json.loads, done.out.splitlines())}
    assert actions["002c.npy"] == "refused"
    assert len(actions) == 8
    assert "promote" in actions.values()


def test_standard_input(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(50, 30)
    text = "".join(json.dumps({"x": r, "label": v}) + "\n" for r, v in zip(x.tolist(), y.tolist(), strict=True))
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    words = ("watch", MODEL, "-", "--reference", place / "reference.npz", "--store", place / "s.db", "--batch", "20", "--json", *QUICK)
    done = run(*words)
    assert done.code == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [r["rows"] for r in found] == [20, 20, 10]
    assert [p for r in found for p in r["predictions"]] == load_model(MODEL)(x).argmax(-1).tolist()
    assert sum(r["labelled"] for r in records(place / "s.db")) == 50
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert run(*words).out == ""  # the same stream from its start: answered before
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"x": [1, 2]\n'))
    assert "standard input, line 1: not JSON" in run(*words).complaint


def test_adapt_writes_a_file_that_helps_and_none_where_nothing_moved(place: Path) -> None:
    x, y = rows(300, 40, True)
    np.savez(place / "new.npz", x=x.numpy())
    found = run("adapt", MODEL, place / "new.npz", "--reference", place / "reference.npz", "-o", place / "a.safetensors", *QUICK, "--json").json
    assert (found["action"], found["output"]) == ("promote", str(place / "a.safetensors"))
    model = load_model(MODEL)
    before = float((model(x).argmax(-1) == y).float().mean())
    exapt.load(model, place / "a.safetensors")
    assert float((model(x).argmax(-1) == y).float().mean()) > before + 0.1
    np.savez(place / "same.npz", x=rows(300, 41)[0].numpy())
    same = run("adapt", MODEL, place / "same.npz", "--reference", place / "reference.npz", "-o", place / "b.safetensors", *QUICK)
    assert same.code == 0
    assert "like the reference" in same.out
    assert not (place / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("watch", MODEL, "days", "--store", "x.db"), "--reference is missing"),
        (("watch", MODEL, "nowhere", "--reference", "reference.npz"), "nowhere: no such folder"),
        (("watch", MODEL, "days", "--reference", "days/001.npy"), 'a column "label"'),
        (("watch", MODEL, "days", "--reference", "nothing.npz"), "nothing.npz: no such file"),
        (("watch", MODEL, "days", "--reference", "reference.npz", "--policy.rowz", "9"), 'did you mean "rows"'),
        (("watch", MODEL, "days", "--reference", "reference.npz", "--policy.rows", "9"), "policy.rows is 9"),
        (("watch", MODEL, "days", "--reference", "reference.npz", "--rank", "9"), "no flag --rank"),
        (("watch", MODEL, "days", "--reference", "reference.npz", "--poll", "0"), "--poll is 0"),
        (("watch", MODEL, "days", "--reference", "reference.npz", "--once", "--out", "days"), "is a folder"),
        (("watch", MODEL, "days", "--reference", "reference.npz", "--once", "--out", "net_of_a_stream.py"), "is not a file of predictions"),
        (("watch", MODEL, "days", "--reference", "reference.npz", "--once", "--store", "net_of_a_stream.py"), "not a store"),
        (("watch", "no-model", "days", "--reference", "reference.npz"), 'model "no-model"'),
        (("watch", "no.yaml", "days"), "no.yaml: no such file"),
        (("adapt", MODEL, "reference.npz", "--reference", "reference.npz", "-o", "days"), "is a folder"),
        (("report", "no.db"), "no.db: no such store"),
        (("report", "net_of_a_stream.py"), "not a store"),
        (("rollback", "no.db", "3"), "no.db: no such store"),
        (("rollback", "no.db"), "DECISION"),
    ],
)
def test_wrong_words(place: Path, words: tuple[str, ...], said: str) -> None:
    assert said in run(*words).complaint


def test_rollback_of_what_is_not_there(place: Path) -> None:
    (place / "days" / "001.npy").rename(place / "one.npy")
    done = run("watch", MODEL, "one.npy", "--reference", "reference.npz", "--store", "s.db", "--once", *QUICK)
    assert done.code == 0, done.err
    assert "there is no decision 7" in run("rollback", "s.db", "7").complaint
    assert "belongs to policy" in run("watch", MODEL, "one.npy", "--reference", "reference.npz", "--store", "s.db", "--once").complaint
    assert rollback(place / "s.db", 1).id == 2


def outcome(key: str, n: int) -> Outcome:
    return Outcome(torch.eye(3)[torch.arange(n) % 3], Decision(1, key, rows=n))


def test_answers_cut_short_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    answers = Answers(path, ("x", "y", "z"))
    answers.write(outcome("one", 4))
    answers.write(outcome("two", 3))
    whole = path.read_bytes()
    assert [json.loads(x)["prediction"] for x in whole.splitlines()] == ["x", "y", "z", "x", "x", "y", "z"]
    for cut in [*range(0, len(whole), 9), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:cut])
        again = Answers(path, ("x", "y", "z"))
        for key, n in (("one", 4), ("two", 3)):
            again.write(outcome(key, n))
        assert path.read_bytes() == whole, cut


def test_a_folder_is_followed(tmp_path: Path) -> None:
    """New files while it runs are taken in order of name, once, and only when they have settled."""
    (tmp_path / "b.npy").write_bytes(b"1")
    found: list[str] = []

    def writer() -> None:
        time.sleep(0.3)
        for name in ("d.npy", "c.npy"):
            (tmp_path / f"{name}.tmp").write_bytes(b"1")
            os.replace(tmp_path / f"{name}.tmp", tmp_path / name)
            os.utime(tmp_path / name, (0, 0))
        (tmp_path / "a.npy").write_bytes(b"still being written")
        os.utime(tmp_path / "a.npy", (time.time() + 3600,) * 2)

    thread = threading.Thread(target=writer)
    thread.start()
    for path in Folder(tmp_path, once=False, poll=0.05):
        found.append(path.name)
        if len(found) == 3:
            break
    thread.join()
    assert found[0] == "b.npy"
    assert sorted(found) == ["b.npy", "c.npy", "d.npy"]


def test_rows_become_inputs(tmp_path: Path) -> None:
    x, both = Reader(label="y").rows([{"a": 1, "b": 2.5, "y": 1}, {"a": 3, "b": 4.5, "y": None}], "here")
    assert x.tolist() == [[1, 2.5], [3, 4.5]]
    assert both.tolist() == [1, -1]
    named = inputs_of({"input_ids": np.zeros((2, 3), dtype=np.int64), "attention_mask": np.ones((2, 3), dtype=np.int64)}, "here")
    assert set(named) == {"input_ids", "attention_mask"}
    with pytest.raises(exapt.InputError, match='"t" holds no numbers'):
        Reader().rows([{"t": "text"}], "here")
    with pytest.raises(exapt.InputError, match="row 1 has the columns b, row 0 a"):
        Reader().rows([{"a": 1}, {"b": 1}], "here")
    with pytest.raises(exapt.InputError, match='lists of column "a" have different lengths'):
        Reader().rows([{"a": [1]}, {"a": [1, 2]}], "here")
    with pytest.raises(exapt.InputError, match="no whole numbers"):
        Reader().rows([{"a": 1, "label": "cat"}], "here")
    with pytest.raises(exapt.InputError, match="has no column besides"):
        Reader().rows([{"label": 1}], "here")
    assert [(k[:12], len(r)) for k, r in lines(io.StringIO('{"a": 1}\n\n{"a": 2}\n{"a": 3}\n{"a": 4}\n'), 2)] == [
        ("stdin-000001", 1),
        ("stdin-000002", 2),
        ("stdin-000003", 1),
    ]
    assert stem(Path("x.tar.npz")) == "x.tar"


@pytest.mark.slow
def test_the_page_about_shifts_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "shift.md").read_text(encoding="utf-8"), re.S | re.M))
    assert code.count("assert") >= 8
    exec(compile(code, "docs/shift.md", "exec"), {})
    assert "covariate promote" in capsys.readouterr().out


@pytest.mark.slow
@needs_minilm
def test_a_configuration_reads_texts_and_names_classes(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml")
    assert run("fit", config).code == 0
    held = [{"text": f"{t} {i}", "label": label} for label, texts in TEXTS.items() for t in texts for i in range(4)]
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "1.jsonl", [{"text": t} for t in TEXTS["good"]])
    write_rows(tmp_path / "in" / "2.jsonl", [{"text": t, "label": "bad"} for t in TEXTS["bad"]])
    write_rows(tmp_path / "in" / "3.jsonl", [{"txt": "?"}])
    words = ("--data.validation", write_rows(tmp_path / "v.jsonl", held), "--store", tmp_path / "s.db", "--once", "--out", tmp_path / "a.jsonl")
    done = run("watch", config, tmp_path / "in", *words)
    assert (done.code, len(done.out.splitlines())) == (2, 2)
    assert 'has no "text"; did you mean "txt"?' in done.err
    said = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    expected = run("predict", config, "--data", tmp_path / "in" / "1.jsonl").out.splitlines()
    assert [s["prediction"] for s in said[:6]] == [json.loads(e)["prediction"] for e in expected]
    assert [(r["key"], r["labelled"]) for r in records(tmp_path / "s.db")] == [("1.jsonl", 0), ("2.jsonl", 6)]


@pytest.mark.slow
def test_killed_and_started_again_is_as_if_it_had_not_been(place: Path) -> None:
    """SIGKILL between any two moments: no batch is lost, none is answered twice, and the decisions are the same."""
    straight = watch(place, "--out", place / "straight.jsonl")
    assert straight.code == 0, straight.err
    words = ["watch", MODEL, "days", "--reference", "reference.npz", "--store", "k.db", "--out", "k.jsonl", "--poll", "0.1", *QUICK]
    for enough in (1, 3, 5):
        running = subprocess.Popen([sys.executable, "-m", "exapt.cli", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(1200):
            if len(set(re.findall(r'"batch": "([^"]*)"', (place / "k.jsonl").read_text() if (place / "k.jsonl").exists() else ""))) >= enough:
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
    again = run(*words, "--once")
    assert again.code == 0, again.err
    assert (place / "k.jsonl").read_text() == (place / "straight.jsonl").read_text()
    plain = [{k: v for k, v in r.items() if k != "seconds"} for r in records(place / "k.db")]
    assert plain == [{k: v for k, v in r.items() if k != "seconds"} for r in records(place / "s.db")]
