"""Domain adaptation on real transfers: ``python bench/shift_transfers.py [--seeds 5] [--worker 0/2]``, then ``--collect``.

Reviews (Amazon, 12 transfers; UCI sentences, 6) and tagged words (CrossNER, four domains to the fifth) as MiniLM features, digits (MNIST to USPS
and optdigits) as features of a small CNN and ViT: a head of two layers is all that trains, by ``exapt.fit`` with an objective, as a LoRA or whole.
SMS spam under other priors; batch-norm statistics of the digits' CNN. Hyper-parameters are frozen on books -> dvd, with dvd's labels, and used as they
are on all the others; that transfer is in no mean. Half of the target is adapted to without its labels, the other half is the test. A model is chosen
without labels of the target (:func:`exapt.shift.select.choose.choose_model`, source-only competes). What was measured is not measured again: the cells
lie in ``runs/shift/cells_transfers``; ``--collect`` writes ``bench/results/shift_transfers.json`` from them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from shift_data import cache, digits, features
from shift_models import digit_input, digit_model
from shift_paired import score, summary
from shift_places import (
    NETWORKS,
    Array,
    Transfer,
    correct,
    places,
    scaled,
    texts,
)
from torch import Tensor, nn

import exapt
from exapt.core.views import Viewer
from exapt.online.norm_statistics import BatchStatistics
from exapt.shift.covariate.classifier_ratio import ClassifierRatio
from exapt.shift.labels.bbse import BBSE
from exapt.shift.labels.em import EM
from exapt.shift.labels.rlls import RLLS
from exapt.shift.select.choose import choose_model
from exapt.shift.select.dev import deep_embedded_risk
from exapt.shift.select.iwv import importance_weighted_risk
from exapt.shift.select.mixval import mixval_score
from exapt.shift.select.mutual_information import information
from exapt.shift.select.snd import soft_neighbourhood_density
from exapt.shift.simulate.streams import prior_shift
from exapt.train import FitConfig
from exapt.train.task import Rows, Task

HERE = Path(__file__).resolve().parent
HIDDEN, BATCH, STEPS, ADAPT_STEPS = 64, 64, 300, 200
GRID: dict[str, tuple[str, tuple[float, ...]]] = {
    "continued": ("", (0.0,)), "iwerm": ("flattening", (0.25, 0.5, 1.0)), "coral": ("weight", (1.0, 30.0, 1000.0)), "dan": ("weight", (0.3, 1.0, 3.0)),
    "dann": ("weight", (0.1, 0.3, 1.0)), "cdan": ("weight", (0.1, 0.3, 1.0)), "mcc": ("weight", (0.1, 0.3, 1.0)), "mdd": ("weight", (0.1, 0.3, 1.0)),
    "shot": ("pseudo", (0.0, 0.3, 1.0)),
}  # fmt: skip
"""Of each method the field that is chosen on books -> dvd, beside the shift (LoRA of rank 8 or the whole head) and the learning rate."""
SHIFTS, RATES = ("lora", "full"), (1e-3, 4e-3)
SPAM = (0.02, 0.3, 0.5, 0.7, 0.9)
CLIP = 0.01  # of the domain classifier's probabilities: no weight above 99 times the ratio of sizes


class Rated(Task):
    """Rows are (features, class) tensors."""

    def collate(self, rows: Rows, labelled: bool = True) -> dict[str, Tensor]:
        batch = {"inputs": torch.stack([r[0] for _, r in rows])}
        return {**batch, "labels": torch.stack([r[1] for _, r in rows])} if labelled else batch

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self.call(model, batch), batch["labels"])


def config(seed: int, steps: int, rate: float) -> FitConfig:
    return FitConfig(steps=steps, batch_size=BATCH, lr=rate, seed=seed, weight_decay=0.01, progress=False, accelerator="cpu", log_every=10_000)


def rows_of(x: Array, y: Array) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)), strict=True))


def source_only(x: Array, y: Array, classes: int, seed: int, steps: int = STEPS) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))
    return exapt.fit(model, Rated(), rows_of(x, y), config=config(seed, steps, 1e-3)).model


@torch.inference_mode()
def outputs(model: nn.Module, x: Array) -> tuple[Array, Array]:
    """Probabilities and the head's input."""
    seen = Viewer(model)(lambda: model(torch.from_numpy(np.ascontiguousarray(x))))
    assert seen.features is not None
    return softmax(seen.logits.double().numpy(), 1), seen.features.numpy()


@dataclass
class Split:
    """One seed's part of a transfer: source rows to learn from and to validate on, the source-only model, weights of the source rows."""

    x: Array
    y: Array
    val: Array
    val_y: Array
    model: nn.Module
    weights: Array
    val_weights: Array
    ess: float


def split(t: Transfer, seed: int, steps: int = STEPS) -> Split:
    order = np.random.default_rng(seed).permutation(len(t.y))
    cut = len(order) * 4 // 5
    train, val = order[:cut], order[cut:]
    # Telling 384 features of domains apart is easy: few components keep the weights from falling on a handful of rows.
    axes = np.linalg.svd(np.concatenate([t.x[train], t.pool]), full_matrices=False)[2][:16].T
    ratio = ClassifierRatio(cv=5, clip=CLIP, random_state=seed).fit(t.x[train] @ axes, t.pool @ axes)
    model = source_only(t.x[train], t.y[train], int(t.y.max()) + 1, seed, steps)
    return Split(t.x[train], t.y[train], t.x[val], t.y[val], model, ratio.weights_, ratio.weight(t.x[val] @ axes), float(ratio.ess_))


def adapted(s: Split, pool: Array, key: str, chosen: dict[str, Any], seed: int, steps: int = ADAPT_STEPS) -> nn.Module:
    """The source-only model after a method. ``continued`` trains on with the source alone for as many steps."""
    fields = {chosen["field"]: chosen["value"]} if chosen["field"] else {}
    if key == "iwerm":
        fields["weights"] = tuple(s.weights.tolist())
    rule = getattr(exapt, "IWERM" if key == "continued" else key.upper())(**fields)
    data: dict[str, Any] = {} if rule.setting == "source-free" else {"source": rows_of(s.x, s.y)}
    if rule.setting in ("adaptation", "source-free"):
        data["target"] = rows_of(pool, np.zeros(len(pool)))
    shift = exapt.LoRA(rank=8) if chosen["shift"] == "lora" else None
    where = None if shift is None else "linear"
    return exapt.fit(copy.deepcopy(s.model), Rated(), objective=rule, method=shift, where=where, config=config(seed, steps, chosen["rate"]), **data).model


def frozen(quick: bool) -> dict[str, dict[str, Any]]:
    """Shift, learning rate and one field of each method: the best on books -> dvd, by the labels of dvd's first half, over two seeds."""
    if quick:
        return {k: {"field": f, "value": v[0], "shift": "lora", "rate": RATES[1]} for k, (f, v) in GRID.items()}
    kept = cells() / "frozen.json"
    if kept.exists():
        return json.loads(kept.read_text())
    t = texts("amazon", "books", "dvd")
    splits = {seed: split(t, seed) for seed in (1000, 1001)}
    best: dict[str, dict[str, Any]] = {}
    for key, (name, values) in GRID.items():
        for value, shift, rate in itertools.product(values, SHIFTS, RATES):
            chosen = {"field": name, "value": value, "shift": shift, "rate": rate}
            models = (adapted(s, t.pool, key, chosen, seed) for seed, s in splits.items())
            score = float(np.mean([(outputs(m, t.pool)[0].argmax(1) == t.pool_y).mean() for m in models]))
            if key not in best or score > best[key]["score"]:
                best[key] = {**chosen, "score": score}
        print("frozen", key, best[key], flush=True)
    write(kept, best)
    return best


def scores(proba: Callable[[Array], tuple[Array, Array]], s: Split, pool: Array, seed: int) -> dict[str, float]:
    """What the label-free scorers make of a candidate: risks on the source's validation rows, the rest on the target's rows."""
    (p_val, h_val), (p, h), (_, h_train) = proba(s.val), proba(pool), proba(s.x)
    losses = -np.log(np.clip(p_val[np.arange(len(s.val_y)), s.val_y], 1e-12, None))
    own = ClassifierRatio(cv=2, clip=CLIP, random_state=seed).fit(h_train, h).weight(h_val)
    mixed = mixval_score(lambda x: proba(x)[0], pool, seed=seed)
    return {
        "iwv": importance_weighted_risk(losses, s.val_weights), "dev": deep_embedded_risk(losses, own), "snd": soft_neighbourhood_density(p),
        "information": information(p), "mixval_intra": mixed.intra, "mixval_inter": mixed.inter,
    }  # fmt: skip


def selected(found: dict[str, dict[str, float]], accuracy: dict[str, float]) -> dict[str, Any]:
    """The choice among candidates; a scorer without a number for one of them is left out."""
    names = [k for k in next(iter(found.values())) if all(np.isfinite(v[k]) for v in found.values())]
    choice = choose_model({k: {c: v[k] for c, v in found.items()} for k in names}, oracle=accuracy)
    return {"name": choice.name, "abstained": choice.abstained, "reason": choice.reason, "agreement": choice.agreement, "regret": choice.regret}


def transfer_cell(t: Transfer, seed: int, chosen: dict[str, dict[str, Any]], quick: bool) -> dict[str, Any]:
    """All methods on one transfer with one seed."""
    steps = (20, 10) if quick else (STEPS, ADAPT_STEPS)
    s = split(t, seed, steps[0])
    counts: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    found: dict[str, dict[str, float]] = {}
    for key in ("source", "label_shift_em", *chosen):
        begin = time.process_time()
        model = s.model if key in ("source", "label_shift_em") else adapted(s, t.pool, key, chosen[key], seed, steps[1])
        em = None
        if key == "label_shift_em":
            em = EM(calibration="bcts", unseen="drop").fit(outputs(model, s.val)[0], s.val_y).estimate(outputs(model, t.pool)[0])
        proba = functools.partial(candidate, model, em)
        seconds[key] = round(time.process_time() - begin, 3)
        counts[key] = [v.tolist() for v in t.measure(proba(t.test)[0].argmax(1))]
        found[key] = scores(proba, s, t.pool, seed)
    choice = selected(found, {k: score(v) for k, v in counts.items()})
    return {"counts": counts, "scores": found, "selected": choice, "ess": s.ess, "source_rows": len(s.y), "seconds": seconds}


def candidate(model: nn.Module, em: EM | None, x: Array) -> tuple[Array, Array]:
    """Probabilities, under another prior if one is given, and features."""
    p, h = outputs(model, x)
    return (p if em is None else em.adjust(p)), h


def spam_cells(seed: int, steps: int = STEPS) -> Iterator[tuple[str, dict[str, Any]]]:
    """SMS under each prior of spam: the source's posteriors corrected by several estimates, and by the true prior."""
    found = features("sms")
    order = np.random.default_rng(0).permutation(len(found.y))
    first, second = np.array_split(order, 2)
    first = np.random.default_rng(seed).permutation(first)
    cut = len(first) * 6 // 10
    train, reference = first[:cut], first[cut:]
    x_train, x_reference, x_target = scaled(found.x[train], found.x[reference], found.x[second])
    model = source_only(x_train, found.y[train], 2, seed, steps)
    p_reference, p_target = outputs(model, x_reference)[0], outputs(model, x_target)[0]
    estimators = {"bbse": BBSE(), "rlls": RLLS(bootstrap=0), "em": EM(), "em_bcts": EM(calibration="bcts")}
    for prior in SPAM:
        rows = prior_shift(found.y[second], [1 - prior, prior], n=400)
        p, y = p_target[rows], found.y[second][rows]
        made, priors = {"source": p}, {"source": float(found.y[train].mean())}
        for key, estimator in estimators.items():
            made[key] = estimator.fit(p_reference, found.y[reference]).estimate(p).adjust(p)
            priors[key] = float(estimator.prior_[1])
        known = p * np.array([1 - prior, prior]) / np.bincount(found.y[reference]) * len(reference)
        made["(true prior)"], priors["(true prior)"] = known / known.sum(1, keepdims=True), prior
        counts = {k: [v.tolist() for v in correct(y)(q.argmax(1))] for k, q in made.items()}
        yield f"13 % -> {100 * prior:.0f} % spam", {"counts": counts, "priors": priors}


@torch.inference_mode()
def norm_cell(target: str, seed: int, most: int = 2000) -> dict[str, Any]:
    """The digits' CNN as it is, and with the statistics of every batch of 64 in its batch norms."""
    test = digits(target)["test"].first(most)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(test.y)))
    x, counts = digit_input(test.x), {}
    for key, method in (("source", None), ("batch_statistics", BatchStatistics()), ("alpha_bn", BatchStatistics(source=0.5))):
        net = copy.deepcopy(digit_model("cnn", seed % NETWORKS["cnn"]))
        called = net if method is None else exapt.online(net, method)
        found = np.empty(len(order), dtype=int)
        for rows in order.split(64):
            found[rows.numpy()] = called(x[rows]).argmax(1).numpy()
        counts[key] = [v.tolist() for v in correct(test.y)(found)]
    return {"counts": counts}


def cells(quick: bool = False) -> Path:
    """Where the cells lie; those of ``--quick`` measure little and lie apart."""
    found = cache() / ("cells_transfers_quick" if quick else "cells_transfers")
    found.mkdir(parents=True, exist_ok=True)
    return found


def write(path: Path, what: Any) -> None:
    """Writes a file whole or not at all."""
    aside = path.with_suffix(f".{os.getpid()}.part")
    aside.write_text(json.dumps(what))
    aside.rename(path)


def rounded(what: Any) -> Any:
    """Numbers of a result with five digits after the point."""
    if isinstance(what, dict):
        return {k: rounded(v) for k, v in what.items()}
    return [rounded(v) for v in what] if isinstance(what, (list, tuple)) else round(what, 5) if isinstance(what, float) else what


def commit(name: str, result: dict[str, Any]) -> None:
    """Writes a result where results are committed."""
    (HERE / "results" / f"{name}.json").write_text(json.dumps(rounded(result), indent=1) + "\n")


def named(folder: Path, family: str, name: str, seed: int) -> Path:
    return folder / f"{family}-{''.join(c if c.isalnum() else '_' for c in name)}-{seed}.json"


def work(seeds: int, worker: tuple[int, int], quick: bool, families: list[str]) -> None:
    """Measures the cells that are missing."""
    torch.set_num_threads(1)
    chosen, folder = frozen(quick), cells(quick)
    jobs: list[tuple[str, str, Callable[[int], dict[str, Any]]]] = [
        (family, name, lambda seed, load=load: transfer_cell(load(seed), seed, chosen, quick)) for family, name, load in places(quick)
    ]
    for domain in () if quick else ("usps", "optdigits"):
        jobs.append(("batch_norm", f"cnn: mnist -> {domain}", functools.partial(norm_cell, domain)))
    for number, (seed, (family, name, measure)) in enumerate(itertools.product(range(seeds), jobs)):
        place = named(folder, family, name, seed)
        if (families and family not in families) or number % worker[1] != worker[0] or place.exists():
            continue
        begin = time.time()
        result = {"family": family, "transfer": name, "seed": seed, **measure(seed)}
        write(place, {**result, "load": os.getloadavg()[0]})
        print(family, name, seed, {k: round(100 * score(v), 1) for k, v in result["counts"].items()}, f"{time.time() - begin:.0f} s", flush=True)
    for seed in range(worker[0], seeds, worker[1]):
        if (families and "spam" not in families) or named(folder, "spam", f"13 % -> {100 * SPAM[-1]:.0f} % spam", seed).exists():
            continue
        for name, result in spam_cells(seed, 20 if quick else STEPS):
            write(named(folder, "spam", name, seed), {"family": "spam", "transfer": name, "seed": seed, **result})
            print("spam", name, seed, {k: round(100 * score(v), 1) for k, v in result["counts"].items()}, flush=True)


def about(command: str) -> dict[str, Any]:
    """The machine and versions."""
    found = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "command": command, "machine": {"processor": found[0] if found else platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("exapt", "torch", "scikit-learn", "scipy", "numpy")}},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Each family's means as Markdown."""
    lines = []
    for family, found in result["families"].items():
        if found["mean"]:
            n, seeds = found["mean"]["source"]["transfers"], sorted({len(t["source"]["seeds"]) for t in found["transfers"].values()})
            lines += [
                f"\n{family}, {n} transfers of {' to '.join(map(str, (seeds[0], seeds[-1])))} seeds\n",
                "| method | score | against source-only, points | worst transfer | better / worse |",
                "|" + "---|" * 5,
            ]
        for key, m in found["mean"].items():
            d, low, high = (f"{100 * m[k]:+.1f}" for k in ("difference", "low", "high"))
            lines.append(f"| {key} | {100 * m['score']:.1f} | {d} [{low}, {high}] | {100 * m['worst']:+.1f} | {m['better']} / {m['worse']} |")
    return "\n".join(lines)


def collect(seeds: int, quick: bool = False) -> dict[str, Any]:
    """One file of all cells."""
    found = [json.loads(f.read_text()) for f in sorted(cells(quick).glob("*-*.json"))]
    found = [c for c in found if c["seed"] < seeds]
    if not found:
        raise SystemExit(f"{cells(quick)}: no cells; run without --collect first")
    choices = [{k: c[k] for k in ("family", "transfer", "seed", "selected", "ess", "source_rows")} for c in found if "selected" in c]
    return {
        **about("python bench/shift_transfers.py; python bench/shift_transfers.py --collect"), "seeds": sorted({c["seed"] for c in found}), "cells": len(found),
        "frozen_on": "amazon: books -> dvd", "frozen": frozen(quick), "grid": {"fields": GRID, "shifts": SHIFTS, "rates": RATES},
        "training": {"hidden": HIDDEN, "batch": BATCH, "steps": STEPS, "adapt_steps": ADAPT_STEPS}, "networks": NETWORKS,
        "families": summary(found), "choices": choices,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one transfer of each set of texts, few steps: to see that it runs")
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--family", action="append", default=[], help="only these")
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args(arguments)
    if not given.collect:
        own, _, of = given.worker.partition("/")
        work(given.seeds, (int(own), int(of)), given.quick, given.family)
        return
    result = collect(given.seeds, given.quick)
    if not given.quick:
        commit("shift_transfers", result)
    print(table(result))


if __name__ == "__main__":
    main()
