"""Every merge rule on real adapters: ``python bench/algebra.py [--seeds 5] [--families digits,amazon,crossner] [--worker 0/2]``, then ``--collect``.

One LoRA for each domain (``bench/algebra_data.py``), merged by every rule of the catalogue at its defaults. Of rules on differences the factor on the merged
difference is chosen on validation rows of all domains; Fisher, Gram matrices and sensitivities are of 64 training rows of each expert's own domain. Beside
them: the base, every expert, the greedy soup, and one LoRA trained on all domains (the upper bound). Measured on rows that nothing has seen: the mean over
domains and the worst. Cells are kept in ``runs/algebra``; ``--collect`` writes ``bench/results/algebra.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from algebra_data import FAMILIES, counts, loss_of, prepared, runs
from torch import Tensor, nn

import exapt
from exapt.algebra.choose.soup import greedy_soup
from exapt.algebra.rule import rule_of
from exapt.algebra.rules.pcb import competition_balanced
from exapt.algebra.statistics import diagonal_fisher, gram_matrices, layer_scores, sensitivities
from exapt.algebra.tensors import merge_tensors

HERE = Path(__file__).resolve().parent
FACTORS = (0.3, 0.6, 1.0, 1.5)
KNOWN = 64
Tree = dict[str, Tensor]


class Bench:
    """One family and seed: trees of the weights that the LoRAs change, and how good any such tree is."""

    def __init__(self, name: str, seed: int) -> None:
        self.family, folder = prepared(name, seed)
        self.model: nn.Module = copy.deepcopy(self.family.model).eval()
        self.domains = list(self.family.domains)
        self.sites = list(exapt.read(folder / f"{self.domains[0]}.safetensors").rules[0]["sites"])
        self.experts = {d: self.tree(exapt.merge(exapt.load(copy.deepcopy(self.family.model), folder / f"{d}.safetensors"))) for d in (*self.domains, "all")}
        self.base = self.tree(self.family.model)

    def tree(self, model: nn.Module) -> Tree:
        found = dict(model.named_parameters())
        return {f"{s}.weight": found[f"{s}.weight"].detach().clone() for s in self.sites}

    def put(self, tree: Tree) -> nn.Module:
        own = dict(self.model.named_parameters())
        for k, t in tree.items():
            own[k].data = t
        return self.model

    def measured(self, tree: Tree, part: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Hits and totals of every row of every domain; of half of the rows where a pass is dear."""
        model = self.put(tree)
        rows = {"validation": 50, "test": 150}[part] * (2 if self.family.name == "digits" else 1)
        return {d: counts(model, self.family.domains[d][part].take(slice(0, rows)), self.family.f1) for d in self.domains}

    def mean(self, tree: Tree, part: str) -> float:
        return float(np.mean([h.sum() / max(t.sum(), 1) for h, t in self.measured(tree, part).values()]))

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Of every expert on rows of its own domain, for the rules that weigh by them."""
        found: dict[str, list[dict[str, Any]]] = {"fisher": [], "regmean": [], "sens_merging": []}
        for d in self.domains:
            model, rows = self.put(self.experts[d]), self.family.domains[d]["train"].take(slice(0, KNOWN))
            for k, p in model.named_parameters():
                p.requires_grad_(k in self.base)
            batches = [rows.take(slice(i, i + 1)).inputs for i in range(len(rows))]
            found["fisher"].append(diagonal_fisher(model, batches, samples=4 if self.family.f1 else None))
            found["regmean"].append(gram_matrices(model, [rows.inputs]))
            labelled = [{"i": torch.tensor([i])} for i in range(len(rows))]
            found["sens_merging"].append(layer_scores(sensitivities(model, labelled, partial(_labelled, rows))))
        return found


def _labelled(rows: Any, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return loss_of(model, rows.take(batch["i"]))


def candidates(bench: Bench) -> Iterator[tuple[str, list[tuple[float, Tree]]]]:
    """Names, and the trees among which validation rows choose."""
    experts = [bench.experts[d] for d in bench.domains]
    yield "base", [(0.0, bench.base)]
    for d in bench.domains:
        yield f"expert {d}", [(1.0, bench.experts[d])]
    yield "all domains at once", [(1.0, bench.experts["all"])]
    yield "greedy_soup", [(1.0, dict(greedy_soup(experts, lambda t: bench.mean(dict(t), "validation")).tensors))]
    known = bench.statistics()
    for key in (*exapt.components("merge rule"), "pcb"):
        try:
            if key == "pcb":
                found, scaled = competition_balanced(experts, bench.base), True
            else:
                found, scaled = merge_tensors(key, experts, bench.base, statistics=known.get(key)), rule_of(key).on_deltas
        except exapt.InputError as e:
            print(f"  {key}: {e}", flush=True)
            continue
        yield key, [(f, {k: bench.base[k] + f * (t - bench.base[k]) for k, t in found.items()}) for f in (FACTORS if scaled else (1.0,))]


def cell(name: str, seed: int, path: Path) -> None:
    """All rules on one family and seed; what was measured stays in the file."""
    bench = Bench(name, seed)
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for rule, options in candidates(bench):
        if rule in done:
            continue
        started = time.perf_counter()
        scores = [bench.mean(t, "validation") for _, t in options] if len(options) > 1 else [0.0]
        factor, tree = options[int(np.argmax(scores))]
        found = bench.measured(tree, "test")
        done[rule] = {"factor": factor, "domains": {d: [h.tolist(), t.tolist()] for d, (h, t) in found.items()}}
        path.with_suffix(".part").write_text(json.dumps(done))
        os.replace(path.with_suffix(".part"), path)
        said = [h.sum() / max(t.sum(), 1) for h, t in found.values()]
        print(f"{name} {seed} {rule} x{factor}: mean {100 * np.mean(said):.1f} worst {100 * min(said):.1f} ({time.perf_counter() - started:.0f} s)", flush=True)


def interval(values: np.ndarray) -> list[float | None]:
    """Mean with a 95 % interval over seeds (Student's t), in points; ``None`` for its ends where there is one seed."""
    from scipy.stats import t

    mean = 100 * float(values.mean())
    if len(values) < 2:
        return [round(mean, 2), None, None]
    half = 100 * float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return [round(v, 2) for v in (mean, mean - half, mean + half)]


def collect() -> None:
    """Writes and prints the table."""
    table: list[dict[str, Any]] = []
    for name in FAMILIES:
        cells = {int(p.stem.rpartition("-")[2]): json.loads(p.read_text()) for p in sorted(runs().glob(f"cells-{name}-*.json"))}
        scores: dict[str, dict[int, list[float]]] = {}
        for seed, found in cells.items():
            for rule, c in found.items():
                scores.setdefault(rule, {})[seed] = [sum(h) / max(sum(t), 1) for h, t in c["domains"].values()]
        for rule, by in scores.items():
            seeds = sorted(s for s in by if s in scores["average"])
            if not seeds:
                continue
            mean, worst = np.array([np.mean(by[s]) for s in seeds]), np.array([min(by[s]) for s in seeds])
            over = mean - np.array([np.mean(scores["average"][s]) for s in seeds])
            table.append({"family": name, "rule": rule, "mean": interval(mean), "worst": interval(worst), "over average": interval(over), "seeds": seeds})
    about = {
        "command": "python bench/algebra.py --seeds 5; --collect", "version": exapt.__version__, "torch": torch.__version__,
        "machine": f"{platform.machine()}, 2 shared cores", "factors": FACTORS, "measure": "accuracy; crossner: F1 of words that are not O",
    }  # fmt: skip
    out = HERE / "results" / "algebra.json"
    out.write_text(json.dumps({"about": about, "table": table}, indent=1) + "\n")
    for name in FAMILIES:
        print(f"\n{name}")
        for r in sorted((r for r in table if r["family"] == name), key=lambda r: -r["mean"][0]):
            over = r["over average"]
            said = f"mean {r['mean'][0]:5.1f}  worst {r['worst'][0]:5.1f}  over average {over[0]:+.1f} {over[1:]}"
            print(f"  {r['rule']:24} {said}  {len(r['seeds'])} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--worker", default="0/1", help="i/n: the i-th of n processes")
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.collect:
        collect()
        return
    i, n = (int(v) for v in given.worker.split("/"))
    for seed in range(i, given.seeds, n):
        for name in given.families.split(","):
            cell(name, seed, runs() / f"cells-{name}-{seed}.json")


if __name__ == "__main__":
    main()
