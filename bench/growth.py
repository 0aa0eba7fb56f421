"""How cost grows: ``python bench/growth.py`` measures, writes ``bench/results/growth.json`` and draws ``docs/images/growth.png``.

Attach, a training step, merge, save, load, detach and activate of a LoRA, against the number of sites, the rank, the width of a layer and the number
of adapters that are resident already. Each is fitted as ``size ** exponent`` over the larger half of the sizes, where constants no longer hide the
growth, and compared with what the maths asks: linear in sites, at most linear in the rank, the square of the width where the matrix itself is
touched, and not at all in the number of other adapters. Processor time on one thread; the rounds go through all sizes in turn, so that what else the
machine does falls on all of them. ``--quick`` does it once on small sizes; ``--draw`` only draws and prints.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import exapt

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "images" / "growth.png"
VERBS = ("attach", "step", "merge", "unmerge", "save", "load", "activate", "detach")
SIZES = {
    "sites": (10, 32, 100, 316, 1000, 3162, 10000),
    "rank": (1, 4, 16, 64, 256, 512),
    "width": (128, 256, 512, 1024, 2048, 4096, 8192),
    "adapters": (1, 10, 100, 1000, 10000),
}
QUICK = {"sites": (10, 30, 90), "rank": (1, 8, 64), "width": (64, 128, 256), "adapters": (1, 10, 100)}
ASKED: dict[str, dict[str, float]] = {
    "sites": dict.fromkeys(VERBS, 1.0),
    "rank": {**dict.fromkeys(VERBS, 1.0), "unmerge": 0.0, "activate": 0.0, "detach": 0.0},
    "width": {"attach": 1.0, "step": 2.0, "merge": 2.0, "unmerge": 2.0, "save": 1.0, "load": 0.0, "activate": 0.0, "detach": 0.0},
    "adapters": {**dict.fromkeys(VERBS, 0.0)},
}
"""The exponents that the maths asks. (A file is mapped, not read, so loading does not touch the numbers; unmerging gives matrices back.)"""
MARGIN = 0.2
"""What a measured exponent may be above: numbers that no longer fit a cache cost more each."""


class Block(nn.Module):
    """Ten layers, one after the other."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def chain(sites: int, width: int) -> nn.Module:
    """A model of ``sites`` linear layers of the same width, in blocks of ten."""
    with torch.device("meta"):
        blocks = [Block(width, min(10, sites - i)) for i in range(0, sites, 10)]
        model = nn.Sequential(*blocks)
    torch.manual_seed(0)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=width**-0.5)
    return model


def seconds(run: Callable[[], Any]) -> float:
    """Processor seconds of one call."""
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def stepper(model: nn.Module, width: int) -> Callable[[], None]:
    """A training step on four rows of 16: forward, backward and a step of SGD on what trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6)
    x = torch.randn(64, width)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Case:
    """One model of one size, kept over the rounds, and how long each verb takes on it."""

    def __init__(self, axis: str, size: int, folder: Path) -> None:
        sites, width, self.rank = {"sites": (size, 16, 1), "rank": (8, 1024, size), "width": (2, size, 8), "adapters": (4, 16, 1)}[axis]
        self.width, self.file = width, folder / f"{axis}-{size}.safetensors"
        self.model = chain(sites, width)
        for i in range(size if axis == "adapters" else 0):
            exapt.attach(self.model, exapt.LoRA(rank=1), where=self.where, name=f"resident{i}")
        self.resident = exapt.adapters(self.model)[:1]

    where = staticmethod(lambda site: site.layer is not None)

    def times(self) -> dict[str, float]:
        """One round: each verb once, on one more adapter, which goes again."""
        model, method = self.model, exapt.LoRA(rank=self.rank)
        found = {"attach": seconds(lambda: exapt.attach(model, method, where=self.where, name="one"))}
        step = stepper(model, self.width)
        step()
        found["step"] = seconds(step)
        with unittest.mock.patch("os.fsync", return_value=None):  # the disk's own time is not ours
            found["save"] = seconds(lambda: exapt.save(model, self.file, "one"))
        exapt.activate(model, *self.resident)
        found["activate"] = seconds(lambda: exapt.activate(model, "one"))
        found["merge"] = seconds(lambda: exapt.merge(model, "one"))
        found["unmerge"] = seconds(lambda: exapt.unmerge(model))
        found["detach"] = seconds(lambda: exapt.detach(model, "one"))
        found["load"] = seconds(lambda: exapt.load(model, self.file, "one"))
        exapt.detach(model, "one")
        return found


def measured(axis: str, sizes: tuple[int, ...], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by verb and size."""
    found: dict[str, dict[str, list[float]]] = {v: {str(s): [] for s in sizes} for v in VERBS}
    with tempfile.TemporaryDirectory() as name:
        cases: dict[int, Case] = {}
        for i in range(rounds + 1):  # the first round is not counted: it pays for what is made once
            for size in sizes:
                print(f"{axis} {size}: round {i} of {rounds}", file=sys.stderr)
                case = cases.pop(size, None) or Case(axis, size, Path(name))
                for verb, t in case.times().items():
                    if i:
                        found[verb][str(size)].append(t)
                if axis != "width":  # the widest models would not fit beside each other
                    cases[size] = case
                del case
                gc.collect()
    return found


def exponent(times: dict[str, list[float]], seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """The slope of the logarithm of the time over that of the size, larger half of the sizes, and its 95% bootstrap interval over the rounds.

    >>> round(exponent({"1": [1.0], "10": [9.0], "100": [90.0], "1000": [900.0]})["exponent"], 6)
    1.0
    """
    sizes = sorted(times, key=int)[len(times) // 2 - (len(times) < 4) :]
    x = np.log([int(s) for s in sizes])
    values = [np.asarray(times[s]) for s in sizes]
    generator = np.random.default_rng(seed)

    def slope(medians: list[float]) -> float:
        return float(np.polyfit(x, np.log(medians), 1)[0])

    slopes = [slope([float(np.median(generator.choice(v, len(v)))) for v in values]) for _ in range(draws if len(values[0]) > 1 else 1)]
    low, high = np.percentile(slopes, [2.5, 97.5])
    return {"exponent": slope([float(np.median(v)) for v in values]), "low": float(low), "high": float(high)}


def summary(seconds: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For each axis and verb the exponent, what the maths asks, and whether it is kept."""
    for axis, by_verb in seconds.items():
        for verb, times in by_verb.items():
            fit = exponent(times)
            asked = ASKED[axis][verb]
            yield {"axis": axis, "verb": verb, **fit, "asked": asked, "passed": fit["low"] <= asked + MARGIN}


def draw(result: dict[str, Any], path: Path) -> None:
    """One plot for each axis, on logarithmic axes; the legend says the exponents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, len(result["seconds"]))
    for ax, (axis, by_verb) in zip(np.atleast_1d(axes), result["seconds"].items(), strict=True):
        fits = {s["verb"]: s for s in result["summary"] if s["axis"] == axis}
        for i, (verb, times) in enumerate(by_verb.items()):
            sizes = sorted(map(int, times))
            middle = [1e3 * float(np.median(times[str(s)])) for s in sizes]
            ax.loglog(sizes, middle, marker="o", markersize=3, linewidth=1.2, color=f"C{i}", label=f"{verb} ({fits[verb]['exponent']:.2f})")
        ax.set_xlabel({"adapters": "adapters resident", "sites": "sites", "rank": "rank", "width": "width of a layer"}[axis])
        ax.legend(fontsize=6.5, frameon=False)
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_ylabel("processor time, ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def machine() -> dict[str, Any]:
    """Processor, cores and load, as the other benchmarks note them."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in (info.read_text().splitlines() if info.is_file() else ()) if line.startswith("model name")]
    return {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes and draws; see the module's own text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="once, on small sizes")
    parser.add_argument("--draw", action="store_true", help="only draw and print what was measured")
    parser.add_argument("--axis", action="append", choices=tuple(SIZES), help="which axes (default: all); the others are kept as they were")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "growth.json", help="the file of results")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the plot")
    a = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = json.loads(a.out.read_text()) if a.out.is_file() else {"seconds": {}}
    sizes, rounds = (QUICK, 2) if a.quick else (SIZES, a.rounds)
    note = machine()
    for axis in () if a.draw else a.axis or sizes:
        seconds = {**result["seconds"], axis: measured(axis, sizes[axis], rounds)}
        note["load_after"] = round(os.getloadavg()[0], 1)
        versions = {"python": platform.python_version(), **{p: version(p) for p in ("exapt", "torch")}}
        seconds = {k: seconds[k] for k in SIZES if k in seconds}
        result = {"machine": note, "versions": versions, "summary": list(summary(seconds)), "seconds": seconds}
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(result, indent=1) + "\n")  # after each axis, since each takes minutes
    draw(result, a.picture)
    for s in result["summary"]:
        mark = "" if s["passed"] else "  FAIL"
        print(f"{s['axis']:9s} {s['verb']:9s} {s['exponent']:5.2f}  {s['low']:5.2f} to {s['high']:5.2f}  asked {s['asked']:.0f}{mark}")


if __name__ == "__main__":
    main()
