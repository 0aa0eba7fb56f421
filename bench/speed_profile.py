"""Where a training step's time goes beyond the frozen base's: ``python bench/speed_profile.py`` writes ``bench/results/profile.json``.

Every step of an adapter and of the bare frozen base is run in turn under torch's profiler, on one thread, and its time split by operation: products
(of matrices, in batches, sparse ones, and Fourier transforms), every other operation of torch (element by element, copies, reductions), and what
remains outside them (Python, autograd). ``floor`` is 1 and what an adapter's products cost beyond the base's: what would be left of this way to compute
it if every other step were fused away; fewer products may do for some. ``--quick`` does one method on a tiny model.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

import speed_memory
import speed_methods as methods
import torch
from speed import machine
from speed_models import batch, build, freeze
from torch import nn

HERE = Path(__file__).parent
METHODS = ("lora", "dora", "loha", "lokr", "hra", "oft", "glora", "miss", "road", "ia3", "c3a", "adalora", "delora", "bdlora", "ssf")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "scaled_dot", "fft", "sparse")
"""Beginnings of the names of what multiplies: torch's plain names, without ``aten::`` and underscores."""
PARTS = ("products", "other", "outside")


def parts(run: Callable[[], None]) -> dict[str, float]:
    """Seconds of one call by kind of operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        start = time.perf_counter()  # the profiler's clock is the wall's too
        run()
        whole = time.perf_counter() - start
    split = dict.fromkeys(PARTS, 0.0)
    for e in found.key_averages():
        if e.key.startswith("aten::"):
            name = e.key.removeprefix("aten::").lstrip("_")
            split["products" if name.startswith(PRODUCTS) else "other"] += e.self_cpu_time_total / 1e6
    split["outside"] = max(whole - split["products"] - split["other"], 0.0)
    return split


def cell(key: str, kind: str, base: nn.Module, repeats: int) -> dict[str, Any]:
    """The parts of one method's step beyond the frozen base's, over the whole of the base's step; medians of repetitions in turn."""
    frozen = freeze(kind, copy.deepcopy(base)).train()
    model = methods.attach(key, kind, copy.deepcopy(base), methods.statistics(key, kind, base)).train()
    data = batch(kind, base, 4, labels=True)

    def step(of: nn.Module) -> None:
        methods.loss(key, of, data).backward()
        of.zero_grad(set_to_none=True)

    taken: list[tuple[dict[str, float], dict[str, float]]] = []
    for i in range(-1, repeats):
        pair = (parts(lambda: step(frozen)), parts(lambda: step(model)))
        if i >= 0:
            taken.append(pair)
    found = {p: statistics.median((b[p] - a[p]) / sum(a.values()) for a, b in taken) for p in PARTS}
    ratio = statistics.median(sum(b.values()) / sum(a.values()) for a, b in taken)
    base_part = statistics.median(a["products"] / sum(a.values()) for a, _ in taken)
    numbers = {"step": ratio, "floor": 1 + max(found["products"], 0.0), **found, "products of the base": base_part}
    return {**{k: round(v, 3) for k, v in numbers.items()}, "rank": getattr(methods.make(key, kind), "rank", None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    a = parser.parse_args()
    kind, chosen, repeats = ("tiny", ("lora",), 2) if a.quick else (a.model, tuple(a.methods), a.repeats)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = build(kind)
    result: dict[str, Any] = {"model": kind, "repeats": repeats, "machine": machine(), "loads": [round(os.getloadavg()[0], 1)], "methods": {}}
    for key in chosen:
        result["methods"][key] = speed_memory.forked(lambda key=key: cell(key, kind, base, repeats), 600)  # type: ignore[misc]
        print(key, result["methods"][key], file=sys.stderr, flush=True)
    result["loads"].append(round(os.getloadavg()[0], 1))
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "profile.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
