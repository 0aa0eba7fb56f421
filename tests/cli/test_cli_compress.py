"""``exapt compress``: with settings, by the measured drop, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import TEXTS, needs_minilm, run, write_config, write_rows
from torch import nn

import exapt
from exapt.algebra.compress.file import read_compressed


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that no command made."""
    model = exapt.attach(nn.Sequential(nn.Linear(128, 128)), exapt.LoRA(rank=8), where="all")
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.normal_()
    return exapt.save(model, tmp_path_factory.mktemp("plain") / "a.safetensors")


def test_settings_are_the_methods(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    found = run("compress", plain, "-o", out, "--method", "uniform_groups", "--bits", "3", "--group=32", "--json").json
    assert found["method"] == "uniform_groups(bits=3, group=32)"
    assert (found["bytes"], found["bytes_before"]) == (out.stat().st_size, plain.stat().st_size)
    assert found["ratio"] == pytest.approx(plain.stat().st_size / out.stat().st_size)
    before, after = (read_compressed(f).tensors for f in (plain, out))
    apart = sum(float((after[k] - before[k]).square().sum()) for k in before) / sum(float(t.square().sum()) for t in before.values())
    assert 0 < found["relative_error"] == pytest.approx(apart**0.5, rel=1e-5)
    assert found["largest_error"] >= found["relative_error"] * 0.99
    assert found["at"] in before


def test_table(plain: Path, tmp_path: Path) -> None:
    done = run("compress", plain, "-o", tmp_path / "b", "--method", "compeft")
    assert done.code == 0
    assert "compeft()" in done.out
    assert "times smaller" in done.out
    assert (tmp_path / "b.safetensors").stat().st_size < plain.stat().st_size / 8


def test_a_compressed_file_is_compressed_again(plain: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    run("compress", plain, "-o", small, "--method", "cast")
    found = run("compress", small, "-o", tmp_path / "smaller", "--method", "bitdelta", "--json").json
    assert found["bytes"] < found["bytes_before"] == small.stat().st_size


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "compft"], 'did you mean "compeft"'),
        (["--method", "compeft", "--densty", "0.1"], 'did you mean "density"'),
        ([], "needs --max-drop"),
        (["--max-drop", "0.5"], "does not say how it was made"),
        (["--method", "cast", "--certain"], "give --max-drop, or leave these out"),
        (["--method", "cast", "--data.test", "x"], "give --max-drop, or leave these out"),
        (["--max-drop", "0.5", "--bits", "3"], "is a setting of one method"),
        (["--max-drop", "-1", "--config", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_refusals(plain: Path, tmp_path: Path, words: list[str], said: str) -> None:
    assert said in run("compress", plain, "-o", tmp_path / "b.safetensors", *words).complaint
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    rows = [{"text": f"{t}, {end}", "label": label} for label, texts in TEXTS.items() for t in texts for end in ("truly", "as I said")]
    data = {s: str(write_rows(folder / f"own_{s}.jsonl", rows[i::2])) for i, s in enumerate(("validation", "test"))}
    train = str(folder / "train.jsonl")  # write_config writes it
    config = write_config(folder / "run.yaml", data={"train": train, **data}, train={"steps": 15, "batch_size": 12, "lr": 5e-3, "progress": False})
    assert run("fit", config).code == 0
    return folder


@needs_minilm
def test_the_smallest_that_keeps_the_quality(fitted: Path) -> None:
    source, out = fitted / "shift.safetensors", fitted / "small.safetensors"
    found: dict[str, Any] = run("compress", source, "-o", out, "--max-drop", "0", "--json").json  # measured as the file says
    assert (found["measure"], found["data"], found["rows"], found["max_drop"]) == ("accuracy", "validation", 12, 0)
    assert found["drop"] <= 0
    assert found["drop_interval"][0] <= found["drop"] <= found["drop_interval"][1]
    assert found["test"]["rows"] == 12
    assert found["bytes"] == out.stat().st_size < 0.5 * source.stat().st_size
    assert found["tried"][-1]["name"] == found["method"]
    assert all(t["drop"] > 0 for t in found["tried"][:-1])
    before, after = read_compressed(source), read_compressed(out)
    assert before.fingerprint == after.fingerprint
    exapt.core.file.write(after, fitted / "again.safetensors")
    for split, part in (("validation", found), ("test", found["test"])):
        words = ("evaluate", fitted / "run.yaml", "--data.test", fitted / f"own_{split}.jsonl", "--json", "--adapter")
        assert run(*words, source).json["metrics"]["accuracy"] == pytest.approx(part["before"])
        assert run(*words, fitted / "again.safetensors").json["metrics"]["accuracy"] == pytest.approx(part["after"])


@needs_minilm
def test_one_method_and_its_grid(fitted: Path) -> None:
    found = run("compress", fitted / "shift.safetensors", "-o", fitted / "grid", "--method", "uniform_groups", "--max-drop", "100", "--json").json
    assert found["method"] == "uniform_groups(bits=2)"
    words = ("--method", "compeft", "--density", "0.5", "--max-drop", "100", "--config", fitted / "run.yaml", "--data.validation", fitted / "train.jsonl")
    found = run("compress", fitted / "shift.safetensors", "-o", fitted / "one", *words, "--json").json
    assert (found["method"], json.dumps(found["rows"])) == ("compeft(density=0.5)", "12")
    done = run("compress", fitted / "shift.safetensors", "-o", fitted / "one", *words)
    assert "accuracy, validation" in done.out
    assert "accuracy, test" in done.out
