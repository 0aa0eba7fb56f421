"""What ``torch.compile`` gains: ``python bench/compiled.py`` writes ``bench/results/compiled.json``.

Compiled and eager model take turns in one process, on one thread, by processor time: a training step of 4 x 64 tokens and the forward of one token, on a
Llama of 2 layers and width 768. An adapted model is compiled to one full graph.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import machine
from speed_clock import timed
from speed_models import batch, build, freeze
from speed_table import interval, significant
from torch import nn

import exapt

METHODS = ("frozen", "lora", "dora", "ia3", "oft", "adapter")
OUT = Path(__file__).parent / "results" / "compiled.json"


def shortened(layers: int, kind: str) -> nn.Module:
    """The first layers of the benchmark's Llama."""
    model: Any = build(kind)
    model.model.layers = model.model.layers[:layers]
    model.config.use_cache = False
    return model


def adapted(key: str, kind: str) -> nn.Module:
    """The model with a method at its defaults."""
    model = shortened(2, kind).train()
    return freeze(kind, model) if key == "frozen" else exapt.attach(model, exapt.method(key))


def step(model: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward of a loss; gradients are thrown away."""

    def run() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def token(model: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """The forward of one token."""

    def run() -> None:
        with torch.no_grad():
            model(**inputs)

    return run


def measure(key: str, kind: str, repeats: int) -> dict[str, Any]:
    """Ratios of compiled to eager, and how long compiling took."""
    torch.compiler.reset()
    model = adapted(key, kind)
    compiled = torch.compile(model, fullgraph=key != "frozen")  # what makes the bare base ask for a gradient is a hook
    data, one = batch(kind, model, 4, labels=True), {"input_ids": torch.ones(1, 1, dtype=torch.long)}
    begin = time.perf_counter()
    step(compiled, data)()
    token(compiled, one)()
    out: dict[str, Any] = {"compiling_seconds": round(time.perf_counter() - begin, 1)}
    for name, make, given in (("step", step, data), ("token", token, one)):
        eager, fast = make(model, given), make(compiled, given)
        pairs = [(timed(fast), timed(eager)) for _ in range(repeats + 1)][1:]
        out[name] = {"compiled_over_eager": interval([a / b for a, b in pairs]), "eager_seconds": significant(sorted(b for _, b in pairs)[len(pairs) // 2])}
    return out


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes; see the module's own text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--kind", default="llama")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before = json.loads(a.out.read_text())["methods"] if a.out.is_file() and a.methods != ",".join(METHODS) else {}  # some alone: the others stay
    result = {"machine": machine(), "load": os.getloadavg()[0], "methods": before}
    for key in a.methods.split(","):
        result["methods"][key] = measure(key, a.kind, a.repeats)
        print(key, json.dumps(result["methods"][key]), flush=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
