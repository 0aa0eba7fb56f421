"""exapt beside PEFT: ``python bench/run.py`` measures, writes ``bench/results/*.json`` and the table made from them.

Every number is a ratio of two measurements made one after the other in the same run (A B A B), in fresh processes where
the state of the process matters, on one thread. Times are processor time unless said otherwise: the wall clock of a shared
machine measures its other users. ``--quick`` does it all once on a tiny model; ``--table`` only writes the table anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _table import ratios, summary, table

HERE = Path(__file__).parent


def measure(**job: Any) -> dict[str, Any]:
    """The result of one job of ``_work.py`` in a fresh process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        done = subprocess.run([sys.executable, str(HERE / "_work.py"), json.dumps(job), str(out)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def machine() -> dict[str, Any]:
    found = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"processor": found[0] if found else platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}


def run(kind: str, rounds: int, repeats: int) -> dict[str, Any]:
    """All measurements of one model."""
    result: dict[str, Any] = {
        "model": kind,
        "rounds": rounds,
        "repeats": repeats,
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("exapt", "peft", "torch", "transformers")}},
        "lives": [],
    }
    for i in range(rounds):
        for side in ("exapt", "peft") if i else ("exapt", "peft", "full", "frozen"):
            print(f"{kind}: round {i + 1} of {rounds}, {side}", file=sys.stderr)
            result["lives"].append(measure(case="life", side=side, kind=kind, repeats=repeats))
    print(f"{kind}: interleaved", file=sys.stderr)
    result["pair"] = measure(case="pair", kind=kind, repeats=repeats)
    print(f"{kind}: saved for backward", file=sys.stderr)
    result["saved"] = measure(case="saved", kind=kind)
    result["machine"]["load_after"] = round(os.getloadavg()[0], 1)
    result["summary"] = summary(ratios(result))
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes; see the module's own text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="once, on a tiny model")
    parser.add_argument("--table", action="store_true", help="only write the table again from the results there are")
    parser.add_argument("--model", action="append", choices=("llama", "bert", "tiny"), help="which models (default: llama and bert)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per side")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repetitions within a process")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    a = parser.parse_args(arguments)
    a.out.mkdir(parents=True, exist_ok=True)
    kinds = [] if a.table else a.model or (["tiny"] if a.quick else ["llama", "bert"])
    rounds, repeats = (1, 2) if a.quick else (a.rounds, a.repeats)
    for kind in kinds:
        (a.out / f"{kind}.json").write_text(json.dumps(run(kind, rounds, repeats), indent=1) + "\n")
    results = [json.loads(f.read_text()) for f in sorted(a.out.glob("*.json"))]
    text = table([r for r in results if a.quick or r["model"] != "tiny"])
    (a.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
