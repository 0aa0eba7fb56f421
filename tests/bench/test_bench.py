"""The benchmark runs end to end on a tiny model and writes what it promises; its statistics are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import _table

    return _table


def test_interval_of_a_known_sample(table) -> None:
    found = table.interval([float(i) for i in range(1, 102)])
    assert found["median"] == 51.0
    assert found["n"] == 101
    # The exact binomial interval of the median of 101 ordered values is the 41st to the 61st.
    assert abs(found["low"] - 41) <= 2
    assert abs(found["high"] - 61) <= 2


def test_targets_are_judged_by_the_median(table) -> None:
    values = {key: [1.0, 1.0] for key in table.ROWS}
    judged = table.summary({**values, "attach": [0.05, 0.05], "step": [1.01, 1.01]})
    assert judged["attach"]["passed"] is True
    assert judged["step"]["passed"] is False
    assert judged["save"]["passed"] is False
    assert "passed" not in judged["merge"]


@pytest.mark.slow
def test_the_smallest_run_writes_results_and_table(tmp_path: Path, table) -> None:
    pytest.importorskip("peft")
    subprocess.run([sys.executable, str(BENCH / "run.py"), "--quick", "--out", str(tmp_path)], check=True, capture_output=True, timeout=900)
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert set(result["summary"]) == set(table.ROWS)
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in result["summary"].values())
    assert {k for k, row in result["summary"].items() if "passed" in row} == {k for k, (_, target, _) in table.ROWS.items() if target}
    lives = {v["side"]: v for v in result["lives"]}
    assert set(lives) == {"exapt", "peft", "full", "frozen"}
    assert lives["exapt"]["trainable"] == lives["peft"]["trainable"] > 0
    assert len(lives["exapt"]["forty"]) == len(lives["peft"]["forty"]) == 40
    assert {"peft", "torch", "exapt"} <= set(result["versions"])
    assert result["saved"]["exapt float32"]["activations"] <= result["saved"]["full float32"]["activations"]
    assert "| training step / PEFT's |" in (tmp_path / "README.md").read_text()
