"""The benchmark of speed runs end to end on a tiny model and writes what it promises; its statistics are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import speed_table

    return speed_table


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import speed_results

    return speed_results


def measured(**rows: Any) -> dict[str, Any]:
    """A cell as ``speed_cell`` leaves it."""
    about = {"processor": "P", "cores": 2, "threads": 1, "gpu": None, "versions": {"exapt": "0"}}
    return {
        "model": "tiny", "method": "lora", "peer": "LORA", "trainable": {"exapt": 8, "peft": 8}, "file": {"exapt": 9}, "loads": [1.0, 2.0], "wall": 3,
        "made": "2026-01-01", "source": "0", "machine": about, "refused": {"peft": {"merge": "ValueError: no | such"}}, **rows,
    }  # fmt: skip


def test_interval_of_a_known_sample(table: ModuleType) -> None:
    found = table.interval([float(i) for i in range(1, 102)])
    assert found["median"] == 51.0
    assert found["n"] == 101
    # The exact binomial interval of the median of 101 ordered values is the 41st to the 61st.
    assert abs(found["low"] - 41) <= 2
    assert abs(found["high"] - 61) <= 2


def test_ratios_are_of_neighbours(table: ModuleType) -> None:
    row = {"exapt": [1.0, 2.0, 30.0], "peft": [2.0, 4.0, 60.0], "frozen": [1.0, 1.0]}
    assert table.ratio(row, "exapt", "peft") == {"median": 0.5, "low": 0.5, "high": 0.5, "n": 3}
    assert table.ratio(row, "exapt", "frozen")["n"] == 2
    assert table.ratio(row, "exapt", "adapters") is None


def test_a_row_has_medians_ratios_and_tokens(table: ModuleType) -> None:
    rows = table.rows_of(measured(step={"exapt": [0.5], "peft": [1.0], "frozen": [0.25]}, saved={"exapt": [4]}, merge={}), tokens=True)
    assert set(rows) == {"step", "saved"}
    assert rows["step"]["peft"]["median"] == 0.5
    assert rows["step"]["peft_frozen"]["median"] == 4.0
    assert rows["step"]["tokens_per_second"]["exapt"] == 512.0
    assert rows["saved"] == {"median": {"exapt": 4.0}}


def test_the_page_says_ratios_targets_and_refusals(table: ModuleType, pages: ModuleType) -> None:
    cell = measured(step={"exapt": [1.2, 1.2], "peft": [1.0, 1.0], "frozen": [1.0, 1.0]}, attach={"exapt": [0.001], "peft": [0.1]})
    result = json.loads(json.dumps(table.summarised("tiny", [cell, {**measured(), "method": "vera", "failed": "InputError: no"}])))
    text = pages.page([result])
    assert "| training step | at most 1 of PEFT's | 1 | 0 | 1 | 1 | lora on tiny 1.20 |" in text
    assert "| attach | at most 0.1 of PEFT's | 1 | 1 | 0 | 0 |" in text
    assert "- `lora`, PEFT, merge: `ValueError: no | such`" in text
    assert "- `vera`: `InputError: no`" in text


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # of what PEFT imports and calls
@pytest.mark.slow
def test_peers_train_the_same_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    import peft
    import speed_methods
    import speed_models

    for key in ("lora", "dora", "ia3", "oft", "ln_tuning", "prefix_tuning"):
        ours = speed_methods.attach(key, "tiny", speed_models.build("tiny"))
        config = speed_methods.configuration(speed_methods.peer(key, "tiny", ours))
        theirs = peft.get_peft_model(speed_models.build("tiny"), config)
        counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
        assert counts[0] == counts[1] > 0, key


@pytest.mark.slow
def test_the_smallest_run_writes_results(tmp_path: Path, table: ModuleType, pages: ModuleType) -> None:
    pytest.importorskip("peft")
    command = [sys.executable, str(BENCH / "speed.py"), "--quick", "--folder", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    result = json.loads((tmp_path / "out" / "speed_tiny.json").read_text())
    methods = result["methods"]
    assert list(methods) == ["lora", "dora", "prompt_tuning", "bitfit"]
    assert set(methods["lora"]["rows"]) == set(table.ROWS)
    for m in ("lora", "dora"):
        assert methods[m]["trainable"]["exapt"] == methods[m]["trainable"]["peft"] > 0
        assert all(0 < r["peft"]["low"] <= r["peft"]["median"] <= r["peft"]["high"] for r in methods[m]["rows"].values())
        assert methods[m]["rows"]["step"]["frozen"]["median"] > 0
    assert "no merged form" in methods["prompt_tuning"]["refused"]["exapt"]["merge"]
    assert "failed" in methods["bitfit"]  # this Llama has no bias
    whole = methods["lora"]["whole"]
    assert whole["count"] == 5
    assert whole["kept"]["exapt float32"]["activations"] <= whole["kept"]["whole float32"]["activations"]
    assert {"peft", "torch", "exapt"} <= set(result["machine"]["versions"])
    assert "## tiny Llama" in pages.page([result])
    # what is there is not measured again
    stamps = {f: os.stat(f).st_mtime_ns for f in (tmp_path / "cells").glob("*.json")}
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    assert {f: os.stat(f).st_mtime_ns for f in (tmp_path / "cells").glob("*.json")} == stamps


@pytest.mark.slow
@pytest.mark.parametrize(("script", "result"), [("many", "many"), ("growth", "growth"), ("speed_profile", "profile"), ("gpu", "gpu")])
def test_other_benchmarks_run(script: str, result: str, tmp_path: Path) -> None:
    if script == "gpu":
        pytest.importorskip("peft")
    one_file = script in ("growth", "gpu")
    more = ["--out", str(tmp_path / f"{result}.json" if one_file else tmp_path)]
    more += ["--picture", str(tmp_path / "growth.png")] if script == "growth" else []
    done = subprocess.run([sys.executable, str(BENCH / f"{script}.py"), "--quick", *more], capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / f"{result}.json").read_text())
    assert len(found) >= 4
    if script == "speed_profile":
        lora = found["methods"]["lora"]
        assert lora["floor"] == pytest.approx(1 + max(lora["products"], 0.0), abs=2e-3)
        assert lora["products"] > 0
        assert 0 < lora["products of the base"] < 1
    if script == "gpu":
        assert {"frozen", "exapt lora", "peft lora", "exapt dora", "whole"} <= found["step"].keys() == found["token"].keys()
        assert found["step"]["exapt lora"]["tokens_per_second"] > 0
