"""exapt beside PEFT and beside the frozen base: ``python bench/speed.py [--models llama bert] [--methods lora dora]``.

Every number is a ratio of two measurements made one after the other in one process (A B A B), on one thread, of processor
time (on a GPU: between CUDA events, in bfloat16). Every cell, a method on a model, runs in a process forked for it, so that none
inherits another's state. A cell that was measured is not measured again (``--redo`` does, where the library has changed since):
they lie in ``--folder``, and ``--collect``, or the end of a run, writes ``bench/results/speed_<model>.json`` from them.
``--quick`` does a few on a tiny model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU must not start CUDA before a fork
HERE = Path(__file__).parent
SMOLLM = ("lora", "dora", "ia3", "loha", "vera", "oft", "ln_tuning", "prefix_tuning")
TINY = ("lora", "dora", "prompt_tuning", "bitfit")
DEFAULT = ("llama", "bert", "llama_12", "bert_12", "minilm", "vit", "smollm", "resnet")
LIMIT = 600.0


def keys_of(kind: str) -> list[str]:
    """The methods of one model."""
    import speed_methods as methods

    if kind in ("llama", "bert"):
        return [*methods.peft_keys(), *methods.ALONE]
    if kind.endswith("_12"):
        return ["lora"]
    return list({"smollm": SMOLLM, "tiny": TINY}.get(kind, methods.SHORT))


def source() -> str:
    """A short sum of the library's source, which tells whether a cell was measured with the present one."""
    total = hashlib.sha256()
    for f in sorted((HERE.parent / "src" / "exapt").rglob("*.py")):
        total.update(f.read_bytes())
    return total.hexdigest()[:12]


def machine() -> dict[str, Any]:
    """Where it runs, and with what."""
    import torch

    found = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    return {
        "processor": found[0] if found else platform.machine(), "cores": os.cpu_count(), "threads": 1, "gpu": gpu,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("exapt", "peft", "torch", "transformers")}},
    }  # fmt: skip


def cell(key: str, kind: str, base: Any, repeats: int) -> dict[str, Any]:
    """All of one method on one model."""
    import speed_cell
    import speed_memory

    load, start = os.getloadavg()[0], time.perf_counter()
    out = speed_memory.forked(lambda: {**speed_cell.pair(key, kind, base, repeats), "machine": machine()}, LIMIT)
    if "failed" not in out:
        sides = [s for s in ("exapt", "peft") if s in out["trainable"]]
        found = {side: speed_memory.forked(partial(speed_memory.peak, side, key, kind, base, warm=True), LIMIT) for side in sides}
        out["peak"] = {side: [v["peak"]] for side, v in found.items() if "peak" in v}
        for side, v in found.items():
            if "failed" in v:
                out["refused"].setdefault(side, {})["peak"] = v["failed"]
        if key == "lora":
            out["whole"] = speed_memory.whole(kind, base, 1 if repeats < 3 else 3, {"tiny": 5, "llama": 100}.get(kind, 40)) if kind in WHOLE else None
    return {"model": kind, "method": key, "loads": [round(load, 1), round(os.getloadavg()[0], 1)], "wall": round(time.perf_counter() - start), **out}


WHOLE = ("tiny", "llama", "llama_12", "bert_12")


def work(kinds: list[str], chosen: list[str] | None, folder: Path, repeats: int, redo: bool) -> None:
    """Measures the cells that are missing; a method that cannot act on a model says why."""
    import peft  # noqa: F401
    import speed_models
    import torch
    import transformers  # noqa: F401

    import exapt

    exapt.methods()  # imports them all: a file changed meanwhile must not come in by a fork
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder.mkdir(parents=True, exist_ok=True)
    now = source()
    for kind in kinds:
        base = None
        for key in [k for k in chosen or keys_of(kind) if k in keys_of(kind)]:
            target = folder / f"{kind}-{key}.json"
            if target.exists() and not (redo and json.loads(target.read_text())["source"] != now):
                continue
            base = speed_models.build(kind) if base is None else base
            made = {"source": now, "made": time.strftime("%Y-%m-%d"), **cell(key, kind, base, repeats)}
            aside = target.with_suffix(".part")
            aside.write_text(json.dumps(made))
            aside.rename(target)
            print(f"{kind} {key}: {made.get('failed') or str(made['wall']) + ' s'}", file=sys.stderr, flush=True)


def collect(folder: Path, out: Path) -> None:
    """One file for each model: medians of every side and intervals of the ratios, with machine, versions and load."""
    from speed_table import summarised

    cells: dict[str, list[dict[str, Any]]] = {}
    for f in sorted(folder.glob("*-*.json")):
        found = json.loads(f.read_text())
        cells.setdefault(found["model"], []).append(found)
    out.mkdir(parents=True, exist_ok=True)
    for kind, members in cells.items():
        order = keys_of(kind)
        members = [c for key in order for c in members if c["method"] == key]
        text = json.dumps(summarised(kind, members), indent=1)
        text = re.sub(r"\{[^{}]*\}", lambda m: " ".join(m[0].split()), text)  # what holds nothing but numbers stands on one line
        (out / f"speed_{kind}.json").write_text(text + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes; see the module's own text."""
    import speed_models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(speed_models.KINDS), help=f"which (default: {' '.join(DEFAULT)})")
    parser.add_argument("--methods", nargs="+", help="which of each model's (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repetitions of a row")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "speed", help="the cells")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the results")
    parser.add_argument("--redo", action="store_true", help="measure again what was measured with another source of the library")
    parser.add_argument("--collect", action="store_true", help="only write the results from the cells there are")
    parser.add_argument("--quick", action="store_true", help="few methods, twice each, on a tiny model")
    a = parser.parse_args(arguments)
    kinds = a.models or (["tiny"] if a.quick else list(DEFAULT))
    if not a.collect:
        work(kinds, a.methods, a.folder, 2 if a.quick else a.rounds, a.redo)
    collect(a.folder, a.out)


if __name__ == "__main__":
    main()
