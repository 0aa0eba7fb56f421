"""exapt edit: from edits on disk to an adapter file that does them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shell import run, write_rows

import exapt
from exapt.cli.models import load_model

SOURCE = """
import torch
from torch import nn


def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
"""
MODEL = "python:net_to_edit:make"
X = [[1.0, 0.0, 2.0, -1.0], [0.0, 1.0, 1.0, 1.0], [-1.0, 2.0, 0.5, 0.0]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net_to_edit.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_edits_become_an_adapter(place: Path) -> None:
    model = load_model(MODEL)
    now = model(torch.tensor(X)).argmax(-1).tolist()
    rows = [{"prompt": X[0], "target": (now[0] + 1) % 3, "rephrasings": [[1.0, 0.1, 2.0, -1.0]], "locality": [X[1], [X[2], now[2]]]}]
    edits, out = write_rows(place / "edits.jsonl", rows), place / "edited.safetensors"
    done = run("edit", MODEL, edits, "--method", "grace_codebook", "--where", "2", "--radius", "0.5", "-o", out, "--json").json
    assert done["before"] == {"reliability": 0.0, "generalisation": 0.0, "locality": 1.0}
    assert done["after"] == {"reliability": 1.0, "generalisation": 1.0, "locality": 1.0}
    exapt.load(model, out)
    assert model(torch.tensor(X)).argmax(-1).tolist() == [(now[0] + 1) % 3, *now[1:]]
    assert exapt.read(out).provenance == {"edits": str(edits), "editor": "grace_codebook", "settings": {"radius": "0.5"}}
    usual = place / "usual.txt"
    usual.write_text("[0.1, 0.2]\n", encoding="utf-8")
    said = run("edit", MODEL, edits, "--where", "2", "-o", out, "--usual", usual).complaint
    assert "takes no input of shape (2,)" in said
    usual.write_text("".join(json.dumps(x) + "\n" for x in torch.randn(40, 4).tolist()), encoding="utf-8")
    rome = run("edit", MODEL, edits, "--where", "2", "-o", out, "--usual", usual, "--clamp", "30", "--decay", "0", "--json").json
    assert rome["after"]["reliability"] == 1.0
    assert "1 edits by memit" in run("edit", MODEL, edits, "--where", "2", "--method", "memit", "-o", out, "--usual", usual).out


def test_what_cannot_be_done_is_said_in_a_line(place: Path) -> None:
    edits, out = write_rows(place / "edits.jsonl", [{"prompt": X[0], "target": 1}]), place / "edited.safetensors"
    assert "rome needs" in run("edit", MODEL, edits, "--where", "2", "-o", out).complaint.lower()
    assert 'no editor "rom"' in run("edit", MODEL, edits, "--method", "rom", "-o", out).complaint
    assert "--train FILE" in run("edit", MODEL, edits, "--method", "mend", "-o", out).complaint
    assert 'has no "radius"' in run("edit", MODEL, edits, "--radius", "1", "-o", out).complaint
    bad = write_rows(place / "bad.jsonl", [{"prompt": X[0], "target": 1}, {"prompt": X[0]}])
    assert 'bad.jsonl, line 2: an edit is an object with "prompt" and "target"' in run("edit", MODEL, bad, "-o", out).complaint
    bad = write_rows(place / "bad.jsonl", [{"prompt": X[0], "target": -2}])
    assert "line 1: its target is -2" in run("edit", MODEL, bad, "-o", out).complaint
    (place / "bad.jsonl").write_text("{", encoding="utf-8")
    assert "bad.jsonl, line 1: not JSON" in run("edit", MODEL, place / "bad.jsonl", "-o", out).complaint
    (place / "bad.jsonl").write_text("", encoding="utf-8")
    assert "the file is empty" in run("edit", MODEL, place / "bad.jsonl", "-o", out).complaint
    assert "no such file" in run("edit", MODEL, place / "none.jsonl", "-o", out).complaint
    text = write_rows(place / "text.jsonl", [{"prompt": "The sky", "target": "green", "subject": "sea"}])
    assert run("edit", MODEL, text, "-o", out).complaint
    assert not out.exists()
    assert json.loads((place / "edits.jsonl").read_text())["target"] == 1
